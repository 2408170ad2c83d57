"""Stages by command: their identities, inputs and functions.

Every training of a study has the same recipe: steps, batch, learning rate, and the weights of the last step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jax_selftrain import corpus as corpora
from jax_selftrain import evals, hub, training
from jax_selftrain.config import (
    ArmConfig,
    ExtractConfig,
    ImportCorpusConfig,
    MergeConfig,
    PromptFormat,
    SampleConfig,
    StudyConfig,
    TrainConfig,
    common_options,
    yaml_io,
)
from jax_selftrain.config.metadata import Role, fields_with_role, shared_overrides
from jax_selftrain.corpus import open_corpus, parse_mixture
from jax_selftrain.sampling import sample
from jax_selftrain.study.dag import Stage, numerical_environment
from jax_selftrain.study.eval_hooks import train_with_evals, with_default_evals
from jax_selftrain.study.fingerprint_cache import FingerprintCache
from jax_selftrain.study.matched_fragility import CONTINUATIONS, make_control_continuations
from jax_selftrain.study.proxies import corpus_proxies

_SMALL_BATCH = 24
"""Rows of a batch in the A/A repeat with another batch size."""
_WINDOW = ("protocol", "prefix", "suffix", "offset", "random_offset", "min_overlap", "limit")
"""Options of extraction that decide which tokens of a sequence are its suffix."""
_NO_EVALUATION: dict[str, Any] = {
    name: getattr(TrainConfig(), name) for name in ("checkpoint_every", *fields_with_role(TrainConfig, Role.EVALUATION))
}
"""Options of training without evaluation."""


@dataclass(frozen=True)
class StudyModel:
    """A model that a stage reads."""

    ref: str
    fingerprint: str | Stage
    """Fingerprint of the model, or the stage that makes it."""
    label: str
    tokenizer: str
    """Fingerprint of the tokenizer, which training does not change."""
    tokenizer_ref: str
    """The model of the study that it was made from; its config and tokenizer exist before any stage has run."""
    stop_ids: tuple[int, ...] | None = None
    """Token ids that end its texts; None: the rules of sampler and tokenizer."""
    start_id: int | None = None
    """The token that its texts start from; None: the sampler's rule."""


class StageFactory:
    """Makes the stages of a study and runs nothing.

    It reads configs, tokenizers and fingerprints.
    """

    def __init__(self, config: StudyConfig, environment: Mapping[str, Any] | None = None) -> None:
        self.config = config
        self.root = Path(config.out) / "stages"
        self.files = FingerprintCache()
        self._models = {model.name: model for model in config.models}
        self._stage = partial(Stage, environment=numerical_environment() if environment is None else environment)

    def base(self, name: str) -> StudyModel:
        """Return a model of the study as it is before training."""
        model = self._models[name]
        source, ref = hub.open_model(model.model), model.model
        tokenizer = source.tokenizer_fingerprint
        return StudyModel(ref, source.fingerprint, name, tokenizer, ref, model.stop_ids, model.start_id)

    def sample(self, source: StudyModel, arm: ArmConfig, seed: int) -> Stage:
        """Sample a corpus from a model."""
        options = replace(
            self.config.sample,
            model=source.ref,
            seed=seed,
            stop_ids=source.stop_ids,
            start_id=source.start_id,
            **common_options(self.config, self.config.sample),
            **shared_overrides(arm, SampleConfig),
        )
        return self._stage(
            "sample",
            f"sample from {source.label}, seed {seed}",
            yaml_io.to_dict(options, Role.IDENTITY),
            {"model": source.fingerprint, "tokenizer": source.tokenizer},
            lambda out: sample(replace(options, out=str(out))),
            *_tokens_and_flops(source, options.samples * options.max_tokens, options.max_tokens, passes=1),
            is_collective=True,
        )

    def sample_for(self, student: StudyModel, source: StudyModel, arm: ArmConfig, seed: int) -> Stage:
        """Sample from a source and retokenize the text for a student.

        The sampled tokens are kept where the study or the arm says so and the tokenizers are equal.
        """
        sampled = self.sample(source, arm, seed)
        keep = arm.keep_source_tokens or self.config.keep_source_tokens
        if keep and source.tokenizer == student.tokenizer:
            return sampled
        return self._stage(
            "retokenize",
            f"retokenize text of {source.label} for {student.label}, seed {seed}",
            {"stop_id": _stop_id(student)},
            {"corpus": sampled, "tokenizer": student.tokenizer},
            lambda out: corpora.retokenize(
                self.root / sampled.name, student.tokenizer_ref, out, stop_id=_stop_id(student)
            ),
        )

    def import_text(self, student: StudyModel, arm: ArmConfig) -> Stage:
        """Tokenize real text for a student."""
        options = ImportCorpusConfig(source=arm.text, model=student.tokenizer_ref, stop_id=_stop_id(student))
        return self._stage(
            "import",
            f"import {Path(arm.text).name} for {student.label}",
            {"stop_id": options.stop_id},
            {"text": self.files.text(arm.text), "tokenizer": student.tokenizer},
            lambda out: corpora.import_text(replace(options, out=str(out))),
        )

    def shuffle(self, student: StudyModel, corpus: Stage, seed: int) -> Stage:
        """Shuffle the tokens of every document of a corpus."""
        return self._stage(
            "shuffle",
            f"shuffle tokens of {student.label}'s own text, seed {seed}",
            {"seed": seed},
            {"corpus": corpus},
            lambda out: corpora.shuffle(self.root / corpus.name, student.ref, out, seed),
        )

    def decontaminate(self, student: StudyModel, corpus: Stage, seed: int, *, size_matched: bool) -> Stage:
        """Remove the documents that overlap with H, or as many others."""
        options = replace(self.config.extract, model=student.ref)
        window, length = evals.make_window(options), options.min_overlap
        fingerprint = evals.sequences_fingerprint(options.sequences)

        def make(out: Path) -> None:
            found, _ = evals.load_extraction_sets(replace(options, model=student.tokenizer_ref))
            held_out = found.tokens[evals.held_out_half(fingerprint, found.sequence_id), window.prefix :]
            folder = self.root / corpus.name
            if size_matched:
                corpora.size_matched_control(folder, held_out, out, seed=seed, length=length)
            else:
                corpora.remove_overlapping(folder, held_out, out, length=length)

        return self._stage(
            "size_matched" if size_matched else "decontaminate",
            f"{'size-matched control' if size_matched else 'decontaminate'}: {student.label}'s own text, seed {seed}",
            _window_options(options) | ({"seed": seed} if size_matched else {}),
            {"corpus": corpus, "sequences": fingerprint, "tokenizer": student.tokenizer},
            make,
        )

    def train(
        self, start: StudyModel, on: Sequence[Stage], arm: ArmConfig, seed: int, steps: int | None = None
    ) -> StudyModel:
        """Train a model by the study's recipe.

        Args:
            start: the model to train.
            on: corpora with equal shares of the rows that the recipe's `mixture` leaves.
            arm: its changes of the recipe.
            seed: seed of the order of the rows.
            steps: train for this number of steps, without evaluation.
        """
        recipe = with_default_evals(self.config.train, self.config.score, self.config.extract)
        if steps is not None:
            recipe = replace(recipe, steps=steps, max_epochs=None, **_NO_EVALUATION)
        mixture = parse_mixture(recipe.mixture)
        share = (1 - float(sum(part for _, part in mixture))) / len(on)
        options = replace(
            recipe,
            model=start.ref,
            corpus=str(self.root / on[-1].name),
            mixture=(*(f"{self.root / one.name}={share:.9f}" for one in on[:-1]), *recipe.mixture),
            seed=seed,
            **common_options(self.config, recipe),
            **shared_overrides(arm, TrainConfig),
        )
        evaluated = (*options.eval_texts, *options.eval_tasks, options.eval_sequences)
        stage = self._stage(
            "train",
            f"train {start.label} on: {on[-1].label}" + (f" ({arm.name})" if arm.name else ""),
            yaml_io.to_dict(options, Role.IDENTITY) | {"mixture": [str(part) for _, part in mixture]},
            {
                "model": start.fingerprint,
                **{f"corpus {number}": one for number, one in enumerate(on)},
                **{f"mixture {n}": open_corpus(folder).fingerprint for n, (folder, _) in enumerate(mixture)},
                **{f"eval {n}": self.files.eval_files(file) for n, file in enumerate(evaluated) if file},
            },
            lambda out: train_with_evals(replace(options, out=str(out))),
            *_tokens_and_flops(
                start, (options.steps or 0) * options.batch_size * options.seq_len, options.seq_len, passes=3
            ),
            is_collective=True,
        )
        label = f"{start.label} after {arm.name or 'its own text'}, seed {seed}"
        return replace(start, ref=str(self.root / stage.name), fingerprint=stage, label=label)

    def add_noise(self, base: StudyModel, trained: StudyModel, arm: ArmConfig, seed: int) -> StudyModel:
        """Add weight noise, sized by the change of training, to the base."""
        weight = 1.0 if arm.weight is None else arm.weight
        stage = self._stage(
            "noise",
            f"{base.label} with noise of {weight:g} times the change, seed {seed}",
            {"seed": seed, "weight": weight},
            {"base": base.fingerprint, "student": trained.fingerprint},
            lambda out: _make_once(
                out, lambda folder: hub.add_weight_noise(base.ref, trained.ref, folder, seed, weight)
            ),
        )
        return replace(base, ref=str(self.root / stage.name / "model"), fingerprint=stage, label=stage.label)

    def merge(self, base: StudyModel, trained: StudyModel, arm: ArmConfig) -> StudyModel:
        """Interpolate or extrapolate between the base and the trained student."""
        options = MergeConfig(base=base.ref, student=trained.ref, weight=arm.weight)
        stage = self._stage(
            "merge",
            f"{base.label} merged with {trained.label} at {arm.weight}",
            {"weight": arm.weight},
            {"base": base.fingerprint, "student": trained.fingerprint},
            lambda out: _make_once(out, lambda folder: hub.merge(replace(options, out=str(folder)))),
        )
        return replace(base, ref=str(self.root / stage.name / "model"), fingerprint=stage, label=stage.label)

    def score(self, model: StudyModel) -> Stage:
        """Score a model on the study's tasks and texts."""
        options = replace(self.config.score, model=model.ref, **common_options(self.config, self.config.score))
        # By name and content, not by path: a study may be moved with its files.
        references = (*options.tasks, *options.texts, *([options.task_folder] if options.task_folder else []))
        files = {f"{n}: {Path(path).name}": self.files.eval_files(path) for n, path in enumerate(references)}
        return self._stage(
            "score",
            f"score {model.label}",
            yaml_io.to_dict(options, Role.IDENTITY),
            {"model": model.fingerprint, "tokenizer": model.tokenizer, **files},
            lambda out: evals.score(replace(options, out=str(out / "score.json"))),
            is_collective=True,
        )

    def extract(self, model: StudyModel, corpus: Stage | None, base: StudyModel | None = None) -> Stage:
        """Extract the study's sequences from a model.

        Sequences are classified by their overlap with the corpus.

        `base` is the checkpoint that `verify` compares with; None: the model itself.
        """
        options = self.config.extract
        inputs: dict[str, str | Stage] = {} if corpus is None else {"corpus": corpus}
        verified = options.base or (base.ref if base is not None and options.verify else "")
        options = replace(options, corpus="" if corpus is None else str(self.root / corpus.name), base=verified)
        for name, ref in (("base", verified), ("untrained_baseline", options.untrained_baseline)):
            if ref:
                inputs[name] = hub.open_model(ref).fingerprint
        return self._extract(model, options, f"extract from {model.label}", inputs)

    def extract_in_format(self, model: StudyModel, form: PromptFormat) -> Stage:
        """Extract the study's sequences in another format."""
        window = evals.make_window(self.config.extract)
        usual = replace(self._probe_options(), protocol=None, prefix=window.prefix, suffix=window.suffix)
        options = replace(usual, **shared_overrides(form, ExtractConfig))
        return self._extract(model, options, f"extract from {model.label}, {form.name}", {})

    def extract_aa(self, model: StudyModel) -> dict[str, Stage]:
        """Extract again with another batch size and with another dtype."""
        options = self._probe_options()
        other = "bfloat16" if (self.config.dtype or options.dtype) == "float32" else "float32"
        tokens = _SMALL_BATCH * (evals.make_window(options).length + 1)
        repeats: dict[str, dict[str, Any]] = {
            f"batch of {_SMALL_BATCH} rows": {"batch_tokens": tokens},
            other: {"dtype": other},
        }
        return {
            name: self._extract(model, options, f"extract from {model.label}, {name}", {"aa_repeat": name}, **changes)
            for name, changes in repeats.items()
        }

    def extract_continuations(self, model: StudyModel, continuations: Stage) -> Stage:
        """Extract the base's own continuations of unseen text from a model."""
        return self._extract(
            model,
            replace(self._probe_options(), offset=0, random_offset=False, limit=None),
            f"extract continuations of unseen text from {model.label}",
            {"sequences": continuations},
            sequences=str(self.root / continuations.name / CONTINUATIONS),
        )

    def _probe_options(self) -> ExtractConfig:
        """Return the options of extraction without decoding and further inputs."""
        options = replace(self.config.extract, greedy_decode=False, verify=False, base="", untrained_baseline="")
        return replace(options, control_sequences="", duplicate_counts="")

    def _extract(
        self, model: StudyModel, options: ExtractConfig, label: str, inputs: dict[str, str | Stage], **changes: Any
    ) -> Stage:
        options = replace(options, model=model.ref, **{**common_options(self.config, options), **changes})
        given = inputs.get("sequences") or evals.sequences_fingerprint(options.sequences)
        if options.control_sequences:
            inputs["control_sequences"] = evals.sequences_fingerprint(options.control_sequences)
        if options.duplicate_counts:
            inputs["duplicate_counts"] = self.files.eval_files(options.duplicate_counts)
        return self._stage(
            "extract",
            label,
            yaml_io.to_dict(options, Role.IDENTITY),
            {"model": model.fingerprint, "tokenizer": model.tokenizer, **inputs, "sequences": given},
            lambda out: evals.extract(replace(options, out=str(out / "extract.json"))),
            is_collective=True,
        )

    def continue_unseen_text(self, base: StudyModel) -> Stage:
        """Decode a base's greedy continuations of unseen text."""
        options = replace(self.config.extract, model=base.ref, **common_options(self.config, self.config.extract))
        probes = self.config.memorization
        texts, n = probes.unseen_text, probes.max_continuations
        return self._stage(
            "continue",
            f"continue {Path(texts).name} by {base.label}",
            _window_options(options) | {"sequences": n, "start_token": options.start_token, "dtype": options.dtype},
            {"model": base.fingerprint, "tokenizer": base.tokenizer, "texts": self.files.eval_files(texts)},
            lambda out: make_control_continuations(options, texts, n, out),
        )

    def extract_after_relearning(self, model: StudyModel, seed: int) -> Stage:
        """Train briefly on text unrelated to the sequences, then extract them."""
        probes = self.config.memorization
        text = self.import_text(model, ArmConfig("relearning", "text", text=probes.relearn_corpus))
        trained = self.train(model, [text], ArmConfig("relearning"), seed, probes.relearn_steps)
        return self._extract(trained, self._probe_options(), f"extract from {trained.label}", {})

    def measure_proxies(self, student: StudyModel, source: StudyModel, corpus: Stage, seed: int) -> tuple[Stage, Stage]:
        """Measure a corpus under the untrained student and under the source."""
        sampled = self.sample(source, ArmConfig(), seed)
        return self._proxy(student, corpus, self.config.embedding_model), self._proxy(source, sampled)

    def _proxy(self, reader: StudyModel, corpus: Stage, embedder: str = "") -> Stage:
        options = replace(self.config.score, **common_options(self.config, self.config.score))
        documents, vectors = self.config.proxy_sample_size, {}
        if embedder:
            opened = hub.open_model(embedder)
            vectors = {"embedder": opened.fingerprint, "embedder_tokenizer": opened.tokenizer_fingerprint}
        return self._stage(
            "proxies",
            f"proxies under {reader.label}: {corpus.label}",
            {"documents": documents, "dtype": options.dtype, "limit": options.limit},
            {
                "corpus": corpus,
                "model": reader.fingerprint,
                "tokenizer": reader.tokenizer,
                **{f"task {n}": self.files.eval_files(path) for n, path in enumerate(options.tasks)},
                **vectors,
            },
            lambda out: corpus_proxies(
                self.root / corpus.name, reader.ref, options, out, documents=documents, embedding_model=embedder
            ),
        )


def _tokens_and_flops(model: StudyModel, tokens: int, length: int, *, passes: int) -> tuple[int, float]:
    """Return the tokens and FLOPs of passes over rows of `length` tokens.

    A backward pass counts as two passes.
    """
    decoder = hub.open_model(model.tokenizer_ref).config
    return tokens, tokens * training.flops_per_token(decoder, length) * passes / 3


def _stop_id(student: StudyModel) -> int | None:
    """Return the token that ends a student's documents; None: the tokenizer's EOS."""
    return student.stop_ids[0] if student.stop_ids else None


def _make_once(folder: Path, make: Callable[[Path], object]) -> None:
    """Make the model in a stage's folder, unless it exists already."""
    if not (folder / "model").exists():
        make(folder / "model")


def _window_options(options: ExtractConfig) -> dict[str, Any]:
    return {name: value for name, value in yaml_io.to_dict(options).items() if name in _WINDOW}
