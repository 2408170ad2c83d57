"""From text to requests, by the rules of lm-evaluation-harness, so that results can be compared with published ones.

Read from lm-eval 0.4.13 (`TemplateLM._encode_pair`, `TemplateLM.loglikelihood`, `HFLM.tok_encode`,
`HFLM.prefix_token_id`, `utils.get_rolling_token_windows`), and followed here:

- Trailing white space of a context moves to the continuation. Then context and context + continuation are encoded,
  and the continuation's tokens are what the second has beyond the *length* of the first.
- Whether a BOS token is prepended: `add_bos_token` is unset by default, which leaves it to the tokenizer. Llama's
  post-processor prepends BOS, Pythia's prepends nothing. A text that already starts with the written-out prefix token
  (`<s>…`) gets none.
- An empty context becomes the prefix token: the tokenizer's BOS, else its EOS; the continuation is then encoded
  without special tokens. A continuation that itself starts with the prefix token gives that token as its context.

Where the harness would fail (a context of white space only, with a tokenizer that prepends nothing), the prefix token
stands in for the empty context, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from jax_selftrain import hub
from jax_selftrain.errors import InputError
from jax_selftrain.likelihood.engine import LoglikelihoodRequest
from jax_selftrain.models import DecoderConfig


class TokenizedModelInfo(Protocol):
    """What it takes to turn text into requests: a model (`hub.LoadedModel`), or one without its weights."""

    @property
    def config(self) -> DecoderConfig: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def special_tokens(self) -> hub.SpecialTokens: ...


def start_token(model: TokenizedModelInfo) -> int:
    """The token that stands for an empty context: the tokenizer's BOS, else its EOS, else the model's start id.

    Raises:
      InputError: there is none of these.
    """
    tokenizer = model.tokenizer
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, model.special_tokens.bos_token_id):
        if token is not None:
            return int(token)
    raise InputError("the tokenizer has neither a BOS nor an EOS token, so texts without context cannot be scored")


def tokenize(tokenizer: Any, prefix: int, text: str) -> list[int]:
    """Token ids of a text as `HFLM.tok_encode` gives them: with the tokenizer's own special tokens, BOS never twice."""
    if text.startswith(tokenizer.decode(prefix)):
        return list(tokenizer.encode(text, add_special_tokens=False))
    return list(tokenizer.encode(text))


def encode_pair(tokenizer: Any, prefix: int, context: str, continuation: str) -> LoglikelihoodRequest:
    """Token ids of a context and its continuation; see `encode_pairs`."""
    (request,) = encode_pairs(tokenizer, prefix, [(context, continuation)])
    return request


def encode_pairs(tokenizer: Any, prefix: int, pairs: Sequence[tuple[str, str]]) -> list[LoglikelihoodRequest]:
    """Token ids of contexts and their continuations; see the module's rules.

    Every different text is encoded once, and all together: one by one took a twentieth of the time of scoring.

    Args:
      tokenizer: a transformers tokenizer.
      prefix: from `prefix_token`.
      pairs: context (may be empty) and continuation, appended as it stands, so that a separating space belongs to it.

    Returns:
      A request for each pair. Its continuation is empty where the text has no token of its own beyond the context's.
    """
    written_out = tokenizer.decode(prefix)
    plain: dict[str, list[int]] = {}
    special: dict[str, list[int]] = {}

    def with_special(text: str) -> dict[str, list[int]]:
        return plain if text.startswith(written_out) else special

    for context, continuation in pairs:
        if context:
            for text in (context + continuation, context.rstrip()):
                with_special(text)[text] = []
        else:
            plain[continuation] = []
    for texts, add in ((plain, False), (special, True)):
        if texts:
            found = tokenizer(
                list(texts),
                add_special_tokens=add,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            texts.update(zip(texts, found["input_ids"], strict=True))

    def request(context: str, continuation: str) -> LoglikelihoodRequest:
        if not context:
            tokens = plain[continuation]
            return (
                LoglikelihoodRequest(tokens[:1], tokens[1:])
                if tokens[:1] == [prefix]
                else LoglikelihoodRequest([prefix], tokens)
            )
        whole, before = (with_special(text)[text] for text in (context + continuation, context.rstrip()))
        return LoglikelihoodRequest(before, whole[len(before) :]) if before else LoglikelihoodRequest([prefix], whole)

    return [request(*pair) for pair in pairs]


def rolling_windows(tokens: Sequence[int], start: int, max_positions: int) -> Iterator[LoglikelihoodRequest]:
    """Requests that together predict every token of a text of any length once, the first from the start token.

    A window predicts up to `max_positions` tokens; those after the first see one token before what they predict, and
    the last reaches back as far as the model allows (`get_rolling_token_windows` with `context_len=1`).

    Args:
      tokens: the text, start token not included.
      start: the token before the first.
      max_positions: longest input of the model.
    """
    whole = [start, *tokens]
    predicted = 0
    while predicted < len(tokens):
        end = min(predicted + max_positions, len(tokens))
        first = max(0, end - max_positions)
        yield LoglikelihoodRequest(whole[first : predicted + 1], whole[predicted + 1 : end + 1])
        predicted = end
