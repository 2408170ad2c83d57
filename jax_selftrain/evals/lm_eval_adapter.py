"""Our models behind lm-evaluation-harness's interface, so that its hundreds of tasks need not be written again.

`HarnessLM` is a `TemplateLM` of lm-eval 0.4.13. It encodes as the harness's own Hugging Face backend (`HFLM`) does, by
the rules of `scoring.encode`, and answers through the likelihood engine and the decode loop. Importing this module
registers it by name:

    import lm_eval, jax_selftrain.evals.lm_eval_adapter
    lm_eval.simple_evaluate(model="jax-selftrain", model_args="pretrained=FOLDER,mesh=data=4", tasks=["piqa"])
    lm_eval.simple_evaluate(model=HarnessLM(model), tasks=["piqa"])

The harness sees one process (`world_size` 1) and hands over all requests at once: distribution happens beneath it, on
the mesh. That also keeps torch out, which the harness imports for several ranks only.

Generation follows `HFLM.generate_until` with a batch of one, where no row waits for another: after each token the stop
strings are looked for in the last few tokens, as its `MultiTokenEOSCriteria` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from jax_selftrain import hub
from jax_selftrain.config import SampleConfig, yaml_io
from jax_selftrain.errors import InputError
from jax_selftrain.likelihood.engine import Likelihood, LoglikelihoodRequest, loglikelihoods
from jax_selftrain.likelihood.tokenize import encode_pairs, rolling_windows, start_token, tokenize
from jax_selftrain.sampling.generate import PROMPT_TOKENS, SamplingSpec, generate_until
from jax_selftrain.sampling.sampling_params import make_sampling_params

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] != "lm_eval":
        raise
    raise InputError(
        "tasks of lm-evaluation-harness need the package lm-eval: pip install 'jax-selftrain[harness]'"
    ) from missing

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MAX_GEN_TOKS = 256
"""Tokens to write where a task says nothing (`HFLM.max_gen_toks`)."""
_GENERATION = frozenset({"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p"})


LoglikelihoodFn = Callable[[Sequence[LoglikelihoodRequest]], list[Likelihood]]
"""What puts requests to a model: one answer each, in their order."""


class AnsweredInstance(NamedTuple):
    """One request of a task and what came of it."""

    instance: Instance
    likelihoods: Sequence[Likelihood]
    """Of the continuation, or of each window of a rolling request; empty for generation."""
    text: str | None = None
    """What was generated."""


@register_model("jax-selftrain")
class HarnessLM(TemplateLM):
    """A model of ours for `lm_eval.simple_evaluate`, loaded already or by reference."""

    def __init__(
        self,
        pretrained: str | hub.LoadedModel,
        *,
        dtype: str = "float32",
        mesh: str = "",
        preset: str = "tensor",
        batch_tokens: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        seed: int = 0,
        ask: LoglikelihoodFn | None = None,
    ):
        """
        Args:
          pretrained: a loaded model, or what `hub.load_model` takes: a folder, a hub id, a run.
          dtype, mesh, preset: as for `hub.load_model`. In the harness's string of arguments, where commas separate
            them, axes of the mesh are separated by a colon: `mesh=data=4:model=2`.
          batch_tokens: token positions in one device batch of the likelihood engine; None: its own default.
          batch_size: rows per replica that generate together; None or "auto": 64. (How likelihoods are batched
            follows from `batch_tokens`.)
          max_batch_size, device: what the harness hands to every model; only None is possible for `device`.
          seed: of generation with `do_sample`.
          ask: answers requests in place of `likelihood.loglikelihoods`, for instance through files that outlive an
            interruption.

        Raises:
          InputError: an argument is impossible, or the model cannot be loaded or has no tokenizer.
        """
        super().__init__()
        if device is not None:
            raise InputError(f"device={device} cannot be chosen here: JAX_PLATFORMS chooses it, and mesh divides it")
        self.model = _load(pretrained, mesh.replace(":", ","), dtype, preset)
        self.tokenizer = self.model.tokenizer
        self.seed = seed
        self.batch_size = _parse_batch_size(batch_size)
        self._batch_tokens = batch_tokens
        self._ask: LoglikelihoodFn = ask or partial(loglikelihoods, self.model, batch_tokens=batch_tokens)
        self.answered: list[AnsweredInstance] | None = None
        """Set to a list to have every answer noted there."""

    @property
    def max_length(self) -> int:
        """The model's longest input, in tokens."""
        return self.model.config.max_positions

    @property
    def max_gen_toks(self) -> int:
        """Tokens to write where a task says nothing."""
        return MAX_GEN_TOKS

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context: BOS, else EOS."""
        return start_token(self.model)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text, else the prefix token."""
        end = self.model.special_tokens.eos_token_id
        return self.prefix_token_id if end is None else end

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text, as `HFLM.tok_encode` gives them."""
        if add_special_tokens is None:
            return tokenize(self.tokenizer, self.prefix_token_id, string)
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def tok_decode(self, tokens: int | Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation by the tokenizer's own template.

        Raises:
          InputError: the tokenizer has no template.
        """
        if not self.tokenizer.chat_template:
            raise InputError(
                f"{self.model.source.ref}: its tokenizer has no chat template; do not ask for one, or add "
                "chat_template.jinja to the model's folder"
            )
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood (nats) of each request's continuation, and whether it is the greedy one.

        Raises:
          InputError: a continuation has no token of its own, is longer than the model, or gets NaN.
        """
        asked = encode_pairs(self.tokenizer, self.prefix_token_id, [instance.args for instance in requests])
        for instance, request in zip(requests, asked, strict=True):
            if not 1 <= len(request.continuation) <= self.max_length:
                raise InputError(
                    f"{_request_index(instance)}: {instance.args[1][:60]!r} has {len(request.continuation)} tokens of its own "
                    f"behind its context; the model can be asked for 1 to {self.max_length}"
                )
        answers = self._answers(asked, [_request_index(instance) for instance in requests])
        for instance, answer in zip(requests, answers, strict=True):
            self._note(AnsweredInstance(instance, [answer]))
            self.cache_hook.add_partial("loglikelihood", instance.args, (answer.loglikelihood, answer.is_greedy))
        return [(answer.loglikelihood, answer.is_greedy) for answer in answers]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The same for requests that are in tokens already: (texts, context, continuation)."""
        asked = [LoglikelihoodRequest(context, continuation) for _, context, continuation in requests]
        answers = self._answers(asked, [f"request {i}" for i in range(len(asked))])
        return [(answer.loglikelihood, answer.is_greedy) for answer in answers]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood (nats) of each whole text, in windows of the model's length where it is longer."""
        windows: list[list[LoglikelihoodRequest]] = []
        for instance in requests:
            (text,) = instance.args
            windows.append(list(rolling_windows(self.tok_encode(text), self.prefix_token_id, self.max_length)))
        asked = [window for text in windows for window in text]
        where = [_request_index(instance) for instance, text in zip(requests, windows, strict=True) for _ in text]
        answers = iter(self._answers(asked, where))
        totals = []
        for instance, text in zip(requests, windows, strict=True):
            mine = [next(answers) for _ in text]
            totals.append(math.fsum(window.loglikelihood for window in mine))
            self._note(AnsweredInstance(instance, mine))
            self.cache_hook.add_partial("loglikelihood_rolling", instance.args, totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to a stop string, an end token or a number of tokens.

        Raises:
          InputError: a request asks for a way of decoding that is not there, or for more tokens than the model has.
        """
        groups: dict[str, list[int]] = {}
        for i, instance in enumerate(requests):
            groups.setdefault(repr(instance.args[1]), []).append(i)
        texts = [""] * len(requests)
        for members in groups.values():
            for i, text in zip(members, self._generate([requests[i] for i in members], members), strict=True):
                texts[i] = text
        for instance, text in zip(requests, texts, strict=True):
            self._note(AnsweredInstance(instance, [], text))
            self.cache_hook.add_partial("generate_until", instance.args, text)
        return texts

    def _generate(self, requests: Sequence[Instance], ids: Sequence[int]) -> list[str]:
        """Requests with the same options; `ids` are their places among all."""
        options = normalize_gen_kwargs(requests[0].args[1], self.max_gen_toks)
        where = _request_index(requests[0])
        until = handle_stop_sequences(options["until"], eos=self.tok_decode(self.eot_token_id, False))
        room = self.max_length - options["max_gen_toks"]
        if room < 1 or options["max_gen_toks"] < 1:
            raise InputError(
                f"{where}: {options['max_gen_toks']} tokens to generate must be fewer than the model's "
                f"{self.max_length} positions; set max_gen_toks"
            )
        prompts = [self._prompt(instance.args[0])[-room:] for instance in requests]
        written = generate_until(
            self.model,
            prompts,
            options["max_gen_toks"],
            _StopSequences(self.tokenizer, until, self.model.special_tokens.eos_token_ids),
            draws=_sampling_params(self.model, options, self.seed, where),
            ids=ids,
            batch_size=self.batch_size,
            batch_tokens=self._batch_tokens or PROMPT_TOKENS,
        )
        return [postprocess_generated_text(self.tok_decode(tokens), until, None) for tokens in written]

    def _prompt(self, text: str) -> list[int]:
        """Tokens of a context to continue, as `HFLM.tok_batch_encode` gives them; nothing at all becomes the prefix."""
        bos = self.tokenizer.bos_token
        special = not (bos is not None and text.startswith(bos))
        return list(self.tokenizer.encode(text, add_special_tokens=special)) or [self.prefix_token_id]

    def _answers(self, asked: Sequence[LoglikelihoodRequest], where: Sequence[str]) -> list[Likelihood]:
        answers = self._ask(asked)
        for place, answer in zip(where, answers, strict=True):
            if not math.isfinite(answer.loglikelihood):
                raise InputError(
                    f"the log-likelihood of {place} is {answer.loglikelihood}: the model's weights are damaged or "
                    "overflow in this dtype; check them, or try float32"
                )
        return answers

    def _note(self, answered: AnsweredInstance) -> None:
        if self.answered is not None:
            self.answered.append(answered)


class _StopSequences:
    """Whether a continuation ends with its last token: a stop id, or a stop string among the last few tokens.

    `MultiTokenEOSCriteria` decodes as many tokens as the stop string has, and two more.
    """

    def __init__(self, tokenizer: Any, until: Sequence[str], stop_ids: Sequence[int]):
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        self.windows: dict[int, list[str]] = {}
        for string in until:
            length = len(tokenizer.encode(string, add_special_tokens=False)) + 2
            self.windows.setdefault(length, []).append(string)

    def __call__(self, tokens: Sequence[int]) -> bool:
        if tokens[-1] in self.stop_ids:
            return True
        for length, strings in self.windows.items():
            text = self.tokenizer.decode(tokens[-length:])
            if any(string in text for string in strings):
                return True
        return False


def _load(pretrained: str | hub.LoadedModel, mesh: str, dtype: str, preset: str) -> hub.LoadedModel:
    model = pretrained
    if not isinstance(model, hub.LoadedModel):
        model = hub.load_model(str(model), mesh, dtype, preset=preset)
    if model.tokenizer is None:
        raise InputError(f"{model.source.ref}: has no tokenizer, so texts cannot be scored; add tokenizer.json")
    return model


def _parse_batch_size(batch_size: int | str | None) -> int:
    if batch_size is None or str(batch_size).startswith("auto"):
        return 64
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise InputError(f"batch_size={batch_size} should be a number of rows of at least 1, or auto")
    return int(batch_size)


def _sampling_params(model: hub.LoadedModel, options: Mapping[str, Any], seed: int, where: str) -> SamplingSpec | None:
    """How to draw tokens; None for greedy decoding."""
    unknown = sorted(options.keys() - _GENERATION)
    if unknown:
        raise InputError(
            f"{where}: asks for generation with {unknown[0]}, which is not done here"
            f"{yaml_io.did_you_mean(unknown[0], _GENERATION)}; possible are {', '.join(sorted(_GENERATION))}"
        )
    if not options["do_sample"]:
        return None
    truncation = {name: kind(options[name]) for name, kind in _TRUNCATION.items() if options.get(name) is not None}
    config = SampleConfig(model=model.source.ref, temperature=float(options["temperature"]), max_tokens=1, **truncation)
    sampling_params = make_sampling_params(
        config,
        start_id=start_token(model),
        stop_ids=model.special_tokens.eos_token_ids,
        vocab_size=model.config.vocab_size,
        tokenizer_length=model.special_tokens.tokenizer_length,
        max_positions=model.config.max_positions,
    )
    return SamplingSpec(sampling_params, seed)


_TRUNCATION = {"top_k": int, "top_p": float, "min_p": float}


def _request_index(instance: Instance) -> str:
    """Where a request comes from, for messages."""
    if instance.task_name is None:
        return f"request {instance.idx}"
    return f"{instance.task_name}, document {instance.doc_id}, choice {instance.idx}"
