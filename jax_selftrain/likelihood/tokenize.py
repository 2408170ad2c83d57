"""Tokenization of scoring requests by the rules of lm-evaluation-harness.

From lm-eval 0.4.13: `TemplateLM._encode_pair`, `TemplateLM.loglikelihood`, `HFLM.tok_encode`, `HFLM.prefix_token_id`,
`utils.get_rolling_token_windows`.

- Trailing white space of a context moves to the continuation. The tokens of the continuation are those of the whole
  text after the first len(tokens of the context).
- The tokenizer decides if BOS is prepended; a text that starts with the written prefix token (`<s>…`) gets no other.
- An empty context becomes the prefix token. A continuation that starts with it gives its first token as context. A
  context of white space only, which fails in the harness, counts as empty.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from jax_selftrain import hub
from jax_selftrain.errors import InputError
from jax_selftrain.likelihood.engine import LoglikelihoodRequest


def check_tokenizer(model: hub.LoadedModel) -> None:
    """Refuse a model without a tokenizer.

    Raises:
      InputError: says what to add.
    """
    if model.tokenizer is None:
        raise InputError(f"{model.source.ref}: has no tokenizer, so it cannot read texts; add tokenizer.json")


def start_token(model: hub.LoadedModel | hub.ModelRef) -> int:
    """Return the token that replaces an empty context.

    It is the tokenizer's BOS, else its EOS: `HFLM.prefix_token_id` of lm-evaluation-harness ignores config.json. Only
    without both is it the model's start id.

    Raises:
      InputError: there is no such token.
    """
    tokenizer = model.tokenizer
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, model.special_tokens.bos_token_id):
        if token is not None:
            return int(token)
    raise InputError("the tokenizer has neither a BOS nor an EOS token, so texts without context cannot be scored")


def encode_pairs(tokenizer: Any, prefix: int, pairs: Sequence[tuple[str, str]]) -> list[LoglikelihoodRequest]:
    """Tokenize contexts and continuations; see the rules of the module.

    Distinct texts are encoded in two calls: one by one took a twentieth of the time of scoring.

    Args:
      tokenizer: a transformers tokenizer.
      prefix: from `start_token`.
      pairs: context (may be empty) and continuation, which are joined without a separator.

    Returns:
      A request for each pair. Its continuation is empty if the text has no more tokens than the context.
    """
    written_prefix = tokenizer.decode(prefix)

    def key(text: str, context: str) -> tuple[str, bool]:
        """Return a text, and True if the tokenizer adds its special tokens."""
        return text, context != "" and not text.startswith(written_prefix)

    texts = dict.fromkeys(key(text, c) for c, continuation in pairs for text in (c + continuation, c.rstrip()))
    tokens: dict[tuple[str, bool], list[int]] = {}
    for special in (False, True):
        keys = [one for one in texts if one[1] == special]
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        if keys:
            encoded = tokenizer([text for text, _ in keys], add_special_tokens=special, **options)
            tokens |= zip(keys, encoded["input_ids"], strict=True)
    requests = []
    for context, continuation in pairs:
        whole, before = tokens[key(context + continuation, context)], tokens[key(context.rstrip(), context)]
        if not before and whole[:1] != [prefix]:
            whole = [prefix, *whole]
        requests.append(LoglikelihoodRequest(before or whole[:1], whole[max(1, len(before)) :]))
    return requests


def encode_text(tokenizer: Any, text: str, max_tokens: int | None = None) -> tuple[list[int], str]:
    """Tokenize a text without special tokens; truncate tokens and text.

    Special strings such as `</s>` in a text are plain text. A character of several tokens is whole or not in the
    truncated text, so that tokens and text have the same bytes.
    """
    encoding = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    tokens, offsets = encoding["input_ids"], encoding["offset_mapping"]
    if max_tokens is None or len(tokens) <= max_tokens:
        return tokens, text
    kept = max_tokens
    while kept and offsets[kept][0] < offsets[kept - 1][1]:  # the next token is in the same character
        kept -= 1
    kept = kept or max_tokens  # a single character of more tokens
    return tokens[:kept], text[: offsets[kept - 1][1]]


def rolling_windows(tokens: Sequence[int], start: int, max_positions: int) -> Iterator[LoglikelihoodRequest]:
    """Yield requests that together score every token of a text once.

    A window scores up to `max_positions` tokens, and the last extends to the left as far as the model allows
    (`get_rolling_token_windows` with `context_len=1`).

    Args:
      tokens: the text without start token.
      start: context of the first token.
      max_positions: longest input of the model.
    """
    whole = [start, *tokens]
    predicted = 0
    while predicted < len(tokens):
        end = min(predicted + max_positions, len(tokens))
        first = max(0, end - max_positions)
        yield LoglikelihoodRequest(whole[first : predicted + 1], whole[predicted + 1 : end + 1])
        predicted = end
