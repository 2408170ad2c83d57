"""The kinds of stage that a study is made of: what decides each, and how it is done.

Every corpus reaches its student through text (`corpus.retokenize`), the student's own included. All trainings have the
one recipe of the study: the same steps, batch and learning rate, the last step's weights, never more than one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    yaml_io,
)
from jax_selftrain.config.metadata import Role, fields_with_role, shared_overrides
from jax_selftrain.io.fingerprint_cache import FingerprintCache
from jax_selftrain.sampling import sample
from jax_selftrain.study.dag import Stage
from jax_selftrain.study.eval_hooks import train_with_evals
from jax_selftrain.study.matched_fragility import CONTINUATIONS, make_control_continuations
from jax_selftrain.study.proxies import corpus_proxies
from jax_selftrain.study.round_config import with_default_evals

_SMALL_BATCH = 24
"""Rows in a batch when a base is measured again in another size."""
WINDOW = ("protocol", "prefix", "suffix", "offset", "random_offset", "min_overlap", "limit")
"""Options of extraction that decide which tokens of a sequence are its suffix."""
_NO_EVALUATION: dict[str, Any] = {
    name: getattr(TrainConfig(), name) for name in ("checkpoint_every", *fields_with_role(TrainConfig, Role.EVALUATION))
}
"""Options of a training without evaluation."""


@dataclass(frozen=True)
class StudyModel:
    """A model that a stage reads: one of the study's, or what a stage makes."""

    ref: str
    fingerprint: str | Stage
    """Its fingerprint, or the stage."""
    label: str
    tokenizer: str
    """Fingerprint of its tokenizer; training leaves that as it is."""
    stop_ids: tuple[int, ...] | None
    """What ends its texts; None: what the sampler and the tokenizer say."""
    tokenizer_ref: str
    """The model of the study that it was made from; its tokenizer can be opened there before anything is done."""


class StageFactory:
    """Makes the stages of one study; nothing is done or read here but configs, tokenizers and fingerprints."""

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.root = Path(config.out) / "stages"
        self.files = FingerprintCache()
        self.sequences = config.extract.sequences
        self._models = {model.name: model for model in config.models}

    def base(self, name: str) -> StudyModel:
        ref, stop_ids = self._models[name].model, self._models[name].stop_ids
        return StudyModel(ref, self.files.model(ref), name, self.files.tokenizer(ref), stop_ids, ref)

    def sample_and_retokenize(self, source: StudyModel, student: StudyModel, arm: ArmConfig, seed: int) -> Stage:
        """Text that a model wrote, in the tokens of the student."""
        options = replace(
            self.config.sample,
            model=source.ref,
            seed=seed,
            stop_ids=source.stop_ids,
            **self._shared(self.config.sample),
            **shared_overrides(arm, SampleConfig),
        )
        drawn = Stage(
            "sample",
            f"sample {source.label}, seed {seed}",
            yaml_io.to_dict(options, Role.IDENTITY),
            {"model": source.fingerprint, "tokenizer": source.tokenizer},
            lambda out: sample(replace(options, out=str(out))),
            *_tokens_and_flops(source, options.samples * options.max_tokens, options.max_tokens, passes=1),
        )
        if arm.keep_source_tokens:
            return drawn
        return Stage(
            "retokenize",
            f"carry text of {source.label}, seed {seed}, to the tokens of {student.label}",
            {"stop_id": _stop_id(student)},
            {"corpus": drawn, "tokenizer": student.tokenizer},
            lambda out: corpora.retokenize(
                self.root / drawn.name, student.tokenizer_ref, out, stop_id=_stop_id(student)
            ),
        )

    def import_text(self, student: StudyModel, arm: ArmConfig) -> Stage:
        """Real text in the tokens of a student."""
        options = ImportCorpusConfig(source=arm.text, model=student.tokenizer_ref, stop_id=_stop_id(student))
        return Stage(
            "import",
            f"import {Path(arm.text).name} in the tokens of {student.label}",
            {"stop_id": options.stop_id},
            {"text": self.files.text(arm.text), "tokenizer": student.tokenizer},
            lambda out: corpora.import_text(replace(options, out=str(out))),
        )

    def shuffle(self, student: StudyModel, corpus: Stage, seed: int) -> Stage:
        """A corpus with the tokens of every document in random order."""
        return Stage(
            "shuffle",
            f"shuffle the tokens of what {student.label} wrote, seed {seed}",
            {"seed": seed},
            {"corpus": corpus},
            lambda out: corpora.shuffle(self.root / corpus.name, student.ref, out, seed),
        )

    def scrub(self, student: StudyModel, corpus: Stage, seed: int, *, companion: bool) -> Stage:
        """A corpus without what it shows of the held-out half of the sequences, or without as much other text."""
        options = replace(self.config.extract, model=student.ref)
        window, length = evals.make_window(options), options.min_overlap
        mark = evals.sequences_fingerprint(options.sequences)

        def make(out: Path) -> None:
            found, _ = evals.load_extraction_sets(replace(options, model=student.tokenizer_ref))
            held_out = found.tokens[evals.held_out_half(mark, found.sequence_id), window.prefix :]
            folder = self.root / corpus.name
            if companion:
                corpora.size_matched_control(folder, held_out, out, seed=seed, length=length)
            else:
                corpora.remove_overlapping(folder, held_out, out, length=length)

        what = "with as much dropped as is held out" if companion else "without what is held out"
        return Stage(
            "size_matched" if companion else "scrub",
            f"what {student.label} wrote, seed {seed}, {what}",
            _window_options(options) | ({"seed": seed} if companion else {}),
            {"corpus": corpus, "sequences": mark, "tokenizer": student.tokenizer},
            make,
        )

    def train(
        self, start: StudyModel, on: Sequence[Stage], arm: ArmConfig, seed: int, steps: int | None = None
    ) -> StudyModel:
        """The student after the recipe of the study, or after so many steps of it without evaluation on the way."""
        recipe = with_default_evals(self.config.train, self.config.score, self.config.extract)
        if steps is not None:
            recipe = replace(recipe, steps=steps, **_NO_EVALUATION)
        last, earlier = on[-1], on[:-1]
        options = replace(
            recipe,
            model=start.ref,
            corpus=str(self.root / last.name),
            mixture=tuple(f"{self.root / one.name}={1 / len(on):.9f}" for one in earlier),
            seed=seed,
            max_epochs=recipe.max_epochs or 1.0,
            **self._shared(recipe),
            **shared_overrides(arm, TrainConfig),
        )
        files = (
            *options.eval_texts,
            *options.eval_tasks,
            *([options.eval_sequences] if options.eval_sequences else []),
        )
        stage = Stage(
            "train",
            f"train {start.label} on {last.label}" + (f" ({arm.name})" if arm.name else ""),
            yaml_io.to_dict(options, Role.IDENTITY),
            {
                "model": start.fingerprint,
                **{f"corpus {number}": one for number, one in enumerate(on)},
                **{f"measured {number}": self.files.eval_files(file) for number, file in enumerate(files)},
            },
            lambda out: train_with_evals(replace(options, out=str(out))),
            *_tokens_and_flops(
                start, (options.steps or 0) * options.batch_size * options.seq_len, options.seq_len, passes=3
            ),
        )
        label = f"{start.label} after {arm.name or 'its own text'}, seed {seed}"
        return replace(start, ref=str(self.root / stage.name), fingerprint=stage, label=label)

    def noise(self, base: StudyModel, trained: StudyModel, arm: ArmConfig, seed: int) -> StudyModel:
        """The base with noise as long as the change of training, times the arm's weight."""
        weight = 1.0 if arm.weight is None else arm.weight
        stage = Stage(
            "noise",
            f"{base.label} with noise of {weight:g} times the change, seed {seed}",
            {"seed": seed} | ({} if weight == 1 else {"weight": weight}),
            {"base": base.fingerprint, "student": trained.fingerprint},
            lambda out: _make_once(
                out, lambda folder: hub.add_weight_noise(base.ref, trained.ref, folder, seed, weight)
            ),
        )
        return replace(base, ref=str(self.root / stage.name / "model"), fingerprint=stage, label=stage.label)

    def merge(self, base: StudyModel, trained: StudyModel, arm: ArmConfig) -> StudyModel:
        """A point on the line through the base and the trained student."""
        options = MergeConfig(base=base.ref, student=trained.ref, weight=arm.weight)
        stage = Stage(
            "merge",
            f"{base.label} merged with {trained.label} at {arm.weight}",
            {"weight": arm.weight},
            {"base": base.fingerprint, "student": trained.fingerprint},
            lambda out: _make_once(out, lambda folder: hub.merge(replace(options, out=str(folder)))),
        )
        return replace(base, ref=str(self.root / stage.name / "model"), fingerprint=stage, label=stage.label)

    def score(self, model: StudyModel) -> Stage:
        """What a model can do."""
        options = replace(self.config.score, model=model.ref, **self._shared(self.config.score))
        # By name and content, not by place: a study may be moved with its files.
        references = (*options.tasks, *options.texts, *([options.task_folder] if options.task_folder else []))
        files = {f"{n}: {Path(path).name}": self.files.eval_files(path) for n, path in enumerate(references)}
        return Stage(
            "score",
            f"score {model.label}",
            yaml_io.to_dict(options, Role.IDENTITY),
            {"model": model.fingerprint, "tokenizer": model.tokenizer, **files},
            lambda out: evals.score(replace(options, out=str(out / "score.json"))),
        )

    def extract(self, model: StudyModel, corpus: Stage | None) -> Stage:
        """What a model reproduces of the sequences, which are divided by what a corpus showed of them."""
        folder = "" if corpus is None else str(self.root / corpus.name)
        options = replace(self.config.extract, corpus=folder)
        return self._extract(
            model, options, f"extract from {model.label}", {} if corpus is None else {"corpus": corpus}
        )

    def extract_in_format(self, model: StudyModel, form: PromptFormat) -> Stage:
        """The same, asked for in another format."""
        window = evals.make_window(self.config.extract)
        usual = replace(self.config.extract, protocol=None, prefix=window.prefix, suffix=window.suffix)
        options = replace(usual, **shared_overrides(form, ExtractConfig))
        return self._extract(model, options, f"extract from {model.label}, {form.name}", {})

    def extract_aa(self, model: StudyModel) -> dict[str, Stage]:
        """The same once more, on the same model, in ways that should not matter."""
        options = self.config.extract
        dtype = self.config.dtype or options.dtype
        other = "bfloat16" if dtype == "float32" else "float32"
        tokens = _SMALL_BATCH * (evals.make_window(options).length + 1)
        ways: dict[str, dict[str, Any]] = {
            f"{_SMALL_BATCH} rows at once": {"batch_tokens": tokens},
            f"in {other}": {"dtype": other},
        }
        return {
            way: self._extract(model, options, f"extract from {model.label}, {way}", {"again": way}, **changes)
            for way, changes in ways.items()
        }

    def extract_continuations(self, model: StudyModel, continuations: Stage) -> Stage:
        """How many of a base's own continuations a model follows."""
        return self._extract(
            model,
            replace(
                self.config.extract,
                offset=0,
                random_offset=False,
                limit=None,
                control_sequences="",
                duplicate_counts="",
            ),
            f"continuations that {model.label} follows",
            {"sequences": continuations},
            sequences=str(self.root / continuations.name / CONTINUATIONS),
        )

    def _extract(
        self, model: StudyModel, options: ExtractConfig, label: str, inputs: dict[str, str | Stage], **changes: Any
    ) -> Stage:
        options = replace(options, model=model.ref, greedy_decode=False, **{**self._shared(options), **changes})
        given = inputs.get("sequences") or evals.sequences_fingerprint(options.sequences)
        files = {}
        if options.control_sequences:
            files["control_sequences"] = evals.sequences_fingerprint(options.control_sequences)
        if options.duplicate_counts:
            files["duplicate_counts"] = self.files.eval_files(options.duplicate_counts)
        return Stage(
            "extract",
            label,
            yaml_io.to_dict(options, Role.IDENTITY),
            {"model": model.fingerprint, "tokenizer": model.tokenizer, **inputs, **files, "sequences": given},
            lambda out: evals.extract(replace(options, out=str(out / "extract.json"))),
        )

    def continuations(self, base: StudyModel) -> Stage:
        """A base's own continuations of text that nobody was trained on."""
        options = replace(self.config.extract, model=base.ref, **self._shared(self.config.extract))
        asked = self.config.memorization
        texts, n = asked.unseen_text, asked.never_trained_sequences
        return Stage(
            "continue",
            f"continue {Path(texts).name} by {base.label}",
            _window_options(options) | {"sequences": n, "start_token": options.start_token, "dtype": options.dtype},
            {"model": base.fingerprint, "tokenizer": base.tokenizer, "texts": self.files.eval_files(texts)},
            lambda out: make_control_continuations(options, texts, n, out),
        )

    def relearn(self, student: StudyModel, seed: int) -> StudyModel:
        """A model after a moment of text that has nothing to do with the sequences."""
        asked = self.config.memorization
        text = self.import_text(student, ArmConfig("relearning", "text", text=asked.relearn_corpus))
        return self.train(student, [text], ArmConfig("relearning"), seed, asked.relearn_steps)

    def proxies(self, student: StudyModel, source: StudyModel, corpus: Stage, seed: int) -> tuple[Stage, Stage]:
        """What a corpus is to a student before training, and as it was drawn to its source."""
        drawn = self.sample_and_retokenize(source, student, ArmConfig("", keep_source_tokens=True), seed)
        return self._proxy(student, corpus, self.config.embedding_model), self._proxy(source, drawn)

    def _proxy(self, reader: StudyModel, corpus: Stage, embedder: str = "") -> Stage:
        options = replace(self.config.score, **self._shared(self.config.score))
        documents, vectors = self.config.proxy_sample_size, {}
        if embedder:
            vectors = {"embedder": self.files.model(embedder), "embedder's tokenizer": self.files.tokenizer(embedder)}
        return Stage(
            "proxies",
            f"what {corpus.label} is to {reader.label}",
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

    def _shared(self, section: Any) -> dict[str, Any]:
        return {"mesh": section.mesh or self.config.mesh, "dtype": self.config.dtype or section.dtype}


def _tokens_and_flops(model: StudyModel, tokens: int, length: int, *, passes: int) -> tuple[int, float]:
    """Tokens in rows of a length, and the FLOPs of so many passes over them (a backward pass counts for two)."""
    decoder, _ = hub.read_config(model.tokenizer_ref)
    return tokens, tokens * training.flops_per_token(decoder, length) * passes / 3


def _stop_id(student: StudyModel) -> int | None:
    """The token that ends documents for a student; None: its tokenizer's EOS."""
    return student.stop_ids[0] if student.stop_ids else None


def _make_once(folder: Path, make: Callable[[Path], object]) -> None:
    """Make the model in a stage's folder; a whole one that is there already was finished just before a kill."""
    if not (folder / "model").exists():
        make(folder / "model")


def _window_options(options: ExtractConfig) -> dict[str, Any]:
    return {name: value for name, value in yaml_io.to_dict(options).items() if name in WINDOW}
