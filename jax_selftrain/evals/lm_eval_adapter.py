"""Adapter of our models to lm-evaluation-harness.

`HarnessLM` is a `TemplateLM` of lm-eval 0.4.13. It tokenizes as the harness's Hugging Face backend (`HFLM`) does, and
uses the likelihood engine and the decode loop. Importing this module registers it by name:

    import lm_eval, jax_selftrain.evals.lm_eval_adapter
    lm_eval.simple_evaluate(model="jax-selftrain", model_args="pretrained=FOLDER,mesh=data=4", tasks=["piqa"])
    lm_eval.simple_evaluate(model=HarnessLM(model), tasks=["piqa"])

The harness sees one process (`world_size` 1); the mesh distributes the work. (For several ranks it imports torch.)
Generation equals `HFLM.generate_until` with a batch of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from jax_selftrain import hub
from jax_selftrain.config import SampleConfig, yaml_io
from jax_selftrain.errors import InputError
from jax_selftrain.likelihood.engine import Likelihood, LoglikelihoodFn, LoglikelihoodRequest, check_finite
from jax_selftrain.likelihood.resumable import loglikelihoods
from jax_selftrain.likelihood.tokenize import check_tokenizer, encode_pairs, rolling_windows, start_token
from jax_selftrain.sampling.generate import PROMPT_TOKENS, StopCriterion, generate
from jax_selftrain.sampling.sampling_params import POLICY_FIELDS, SamplingParams, make_sampling_params

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] != "lm_eval":
        raise
    raise InputError(
        "tasks of lm-evaluation-harness need the package lm-eval: pip install 'lm-eval>=0.4.13,<0.5'"
    ) from missing

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MAX_GEN_TOKS = 256
"""Default of `HFLM.max_gen_toks`."""
_GENERATION = frozenset({"until", "max_gen_toks", "do_sample", *POLICY_FIELDS})
_NEUTRAL = {"repetition_penalty": 1.0, "length_penalty": 1.0, "num_beams": 1, "no_repeat_ngram_size": 0}
"""Other options of generation, and the values that change nothing."""


class AnsweredInstance(NamedTuple):
    """Request of a task, with its answer."""

    instance: Instance
    likelihoods: Sequence[Likelihood]
    """One, or one per window of a rolling request; empty for generation."""
    text: str | None = None
    """Generated text."""


@register_model("jax-selftrain")
class HarnessLM(TemplateLM):
    """Model for `lm_eval.simple_evaluate`."""

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
        revision: str | None = None,
        trust_remote_code: bool | None = None,
        seed: int = 0,
        loglikelihood_fn: LoglikelihoodFn | None = None,
    ):
        """Load the model.

        Args:
          pretrained: a loaded model, or a reference for `hub.load_model`.
          dtype, mesh, preset: see `hub.load_model`. In the harness's argument string, where commas separate arguments,
            colons separate the axes: `mesh=data=4:model=2`.
          batch_tokens: token positions in one device batch of the likelihood engine; None: its default.
          batch_size: rows per replica in generation; None or "auto": 64.
          max_batch_size, device: passed by the harness; `device` must be None.
          revision: of a model of the hub.
          trust_remote_code: must be unset or false; code of models is never run.
          seed: of generation with `do_sample`.
          loglikelihood_fn: replaces `likelihood.loglikelihoods`, for instance to resume after an interruption.

        Raises:
          InputError: an argument is invalid, or the model cannot be loaded or has no tokenizer.
        """
        super().__init__()
        if device is not None:
            raise InputError(f"device={device} cannot be chosen here: JAX_PLATFORMS chooses it, and mesh divides it")
        if trust_remote_code not in (None, False, "False", "false"):
            raise InputError("trust_remote_code: code of models is never run here; leave it out")
        if not isinstance(pretrained, hub.LoadedModel):
            pretrained = f"{pretrained}@{revision}" if revision else pretrained
            pretrained = hub.load_model(str(pretrained), mesh.replace(":", ","), dtype, preset=preset)
        check_tokenizer(pretrained)
        self.model = pretrained
        self.tokenizer = self.model.tokenizer
        self.seed = seed
        self.batch_size = _parse_batch_size(batch_size)
        self.max_length = self.model.config.max_positions
        """Longest input in tokens."""
        self._batch_tokens = batch_tokens
        self._loglikelihoods = loglikelihood_fn or partial(loglikelihoods, self.model, batch_tokens=batch_tokens)
        self.answered: list[AnsweredInstance] = []
        """All requests so far, with their answers."""

    @property
    def prefix_token_id(self) -> int:
        """Replacement of an empty context: BOS, else EOS."""
        return start_token(self.model)

    @property
    def eot_token_id(self) -> int:
        """End-of-text token, else the prefix token."""
        end = self.model.special_tokens.eos_token_id
        return self.prefix_token_id if end is None else end

    @property
    def tokenizer_name(self) -> str:
        """Key of the tokenizer in the harness's request cache."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenize a text as `HFLM.tok_encode` does."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tok_decode(self.prefix_token_id, False))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def tok_decode(self, tokens: int | Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decode token ids."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Apply the chat template of the tokenizer.

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
        """Return log-likelihood (nats) and is-greedy of each continuation.

        Raises:
          InputError: a continuation has no tokens, is longer than the model, or its log-likelihood is NaN.
        """
        tokenized = encode_pairs(self.tokenizer, self.prefix_token_id, [instance.args for instance in requests])
        for instance, request in zip(requests, tokenized, strict=True):
            if not 1 <= len(request.continuation) <= self.max_length:
                raise InputError(
                    f"{_describe(instance)}: {instance.args[1][:60]!r} has {len(request.continuation)} tokens after "
                    f"its context; the model can score 1 to {self.max_length}"
                )
        answers = [likelihood[:2] for (likelihood,) in self._score(requests, [[request] for request in tokenized])]
        for instance, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", instance.args, answer)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score tokenized requests (texts, context, continuation)."""
        likelihoods = self._loglikelihoods([LoglikelihoodRequest(*tokens) for _, *tokens in requests])
        check_finite((one.loglikelihood for one in likelihoods), (f"request {i}" for i in range(len(requests))))
        return [likelihood[:2] for likelihood in likelihoods]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood (nats) of each text, in rolling windows."""
        texts = (self.tok_encode(instance.args[0]) for instance in requests)
        windows = [list(rolling_windows(text, self.prefix_token_id, self.max_length)) for text in texts]
        scores = self._score(requests, windows)
        totals = [math.fsum(window.loglikelihood for window in text) for text in scores]
        for instance, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", instance.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate until a stop string, a stop id or the token limit.

        Raises:
          InputError: unsupported generation options, or more tokens than the model's positions.
        """
        groups: dict[str, list[int]] = {}
        for i, instance in enumerate(requests):
            groups.setdefault(repr(instance.args[1]), []).append(i)
        texts = [""] * len(requests)
        for members in groups.values():
            for i, text in zip(members, self._generate([requests[i] for i in members], members), strict=True):
                texts[i] = text
        for instance, text in zip(requests, texts, strict=True):
            self.answered.append(AnsweredInstance(instance, [], text))
            self.cache_hook.add_partial("generate_until", instance.args, text)
        return texts

    def _generate(self, requests: Sequence[Instance], ids: Sequence[int]) -> list[str]:
        """Generate for requests with equal options; `ids` key the random bits."""
        options = normalize_gen_kwargs(requests[0].args[1], MAX_GEN_TOKS)
        where = _describe(requests[0])
        until = handle_stop_sequences(options["until"], eos=self.tok_decode(self.eot_token_id, False))
        room = self.max_length - options["max_gen_toks"]
        if room < 1 or options["max_gen_toks"] < 1:
            raise InputError(
                f"{where}: {options['max_gen_toks']} tokens to generate must be fewer than the model's "
                f"{self.max_length} positions; set max_gen_toks"
            )
        prompts = [self._prompt(instance.args[0])[-room:] for instance in requests]
        generated = generate(
            self.model,
            prompts,
            _sampling_params(self.model, options, where),
            seed=self.seed,
            request_ids=ids,
            stop=_stop_criterion(self.tokenizer, until),
            batch_size=self.batch_size,
            batch_tokens=self._batch_tokens or PROMPT_TOKENS,
        )
        return [postprocess_generated_text(self.tok_decode(tokens), until, None) for tokens in generated]

    def _prompt(self, text: str) -> list[int]:
        """Tokenize a prompt as `HFLM.tok_batch_encode` does."""
        bos = self.tokenizer.bos_token
        special = not (bos is not None and text.startswith(bos))
        return list(self.tokenizer.encode(text, add_special_tokens=special)) or [self.prefix_token_id]

    def _score(
        self, instances: Sequence[Instance], requests: Sequence[Sequence[LoglikelihoodRequest]]
    ) -> list[list[Likelihood]]:
        """Score and record the requests of each instance."""
        found = self._loglikelihoods([request for group in requests for request in group])
        labels = (_describe(one) for one, group in zip(instances, requests, strict=True) for _ in group)
        check_finite((likelihood.loglikelihood for likelihood in found), labels)
        remaining = iter(found)
        likelihoods = [list(islice(remaining, len(group))) for group in requests]
        self.answered += map(AnsweredInstance, instances, likelihoods)
        return likelihoods


def _stop_criterion(tokenizer: Any, until: Sequence[str]) -> StopCriterion:
    """Return a stop criterion: a stop string in the last tokens.

    As in the harness's `MultiTokenEOSCriteria`, the number of last tokens is that of the stop string plus two.
    """
    lengths = {string: len(tokenizer.encode(string, add_special_tokens=False)) + 2 for string in until}

    def stop(tokens: Sequence[int]) -> bool:
        texts = {length: tokenizer.decode(tokens[-length:]) for length in set(lengths.values())}
        return any(string in texts[length] for string, length in lengths.items())

    return stop


def _parse_batch_size(batch_size: int | str | None) -> int:
    if batch_size is None or str(batch_size).startswith("auto"):
        return 64
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise InputError(f"batch_size={batch_size} should be a number of rows of at least 1, or auto")
    return int(batch_size)


def _sampling_params(model: hub.LoadedModel, options: Mapping[str, Any], where: str) -> SamplingParams:
    """Translate generation options; temperature 0 without `do_sample`."""
    unknown = sorted(name for name in options.keys() - _GENERATION if options[name] != _NEUTRAL.get(name))
    if unknown:
        raise InputError(
            f"{where}: generation with {unknown[0]} is not supported"
            f"{yaml_io.did_you_mean(unknown[0], _GENERATION)}; possible are {', '.join(sorted(_GENERATION))}"
        )
    stop_ids = model.special_tokens.eos_token_ids
    if not options["do_sample"]:
        return SamplingParams(max_tokens=options["max_gen_toks"], stop_ids=stop_ids, temperature=0)
    given: dict[str, Any] = {
        name: kind(options[name]) for name, kind in POLICY_FIELDS.items() if options.get(name) is not None
    }
    given |= {"max_tokens": options["max_gen_toks"], "start_id": start_token(model)}
    config = SampleConfig(model=model.source.ref, **given)
    return make_sampling_params(config, model.config, model.special_tokens)


def _describe(instance: Instance) -> str:
    if instance.task_name is None:
        return f"request {instance.idx}"
    return f"{instance.task_name}, document {instance.doc_id}, choice {instance.idx}"
