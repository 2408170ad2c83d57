"""The kinds of stage that a study is made of: what decides each, and how it is done.

Every corpus reaches its student through text (`corpus.retokenise`), the student's own included. All trainings have the
one recipe of the study: the same steps, batch and learning rate, the last step's weights, never more than one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from jax_selftrain import corpus as corpora
from jax_selftrain import hub, scoring, settings, training
from jax_selftrain.config import (
    ArmConfig,
    ExtractConfig,
    FormatConfig,
    ImportConfig,
    MergeConfig,
    SampleConfig,
    ScoreConfig,
    StudyConfig,
    TrainConfig,
)
from jax_selftrain.sampling import sample
from jax_selftrain.study.evaluate import train
from jax_selftrain.study.fingerprints import Fingerprints
from jax_selftrain.study.fragility import CONTINUATIONS, write_continuations
from jax_selftrain.study.plan import measured_on_the_way
from jax_selftrain.study.proxies import measure_corpus
from jax_selftrain.study.stages import Stage

_PLACES = ("model", "corpus", "out", "mesh", "seed")
"""Options that say where, or that stand among a stage's inputs."""
_FEW_ROWS = 24
"""Rows in a batch when a base is measured again in another size."""
FORMAT = ("prefix", "suffix", "offset", "random_offset", "start_token")
"""What a format may change."""
_NOT_THE_WINDOW = tuple(
    f.name
    for f in fields(ExtractConfig)
    if f.name not in ("protocol", "prefix", "suffix", "offset", "random_offset", "overlap", "limit")
)
"""Options of extraction that have no part in which tokens of a sequence are its suffix."""
_UNMEASURED: dict[str, Any] = {
    f.name: f.default
    for f in fields(TrainConfig)
    if f.name.startswith("eval_") or f.name in ("stop_metric", "checkpoint_every")
}
"""Training without evaluation on the way."""


@dataclass(frozen=True)
class Model:
    """A model that a stage reads: one of the study's, or what a stage makes."""

    ref: str
    mark: str | Stage
    """Its fingerprint, or the stage."""
    label: str
    tokenizer: str
    """Fingerprint of its tokenizer; training leaves that as it is."""
    stop_ids: tuple[int, ...] | None
    """What ends its texts; None: what the sampler and the tokenizer say."""
    home: str
    """The model of the study that it was made from; its tokenizer can be opened there before anything is done."""


class StageKinds:
    """Makes the stages of one study; nothing is done or read here but configs, tokenizers and fingerprints."""

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.root = Path(config.out) / "stages"
        self.files = Fingerprints()
        self.sequences = config.extract.sequences
        self._models = {model.name: model for model in config.models}

    def base(self, name: str) -> Model:
        ref, stop_ids = self._models[name].model, self._models[name].stop_ids
        return Model(ref, self.files.model(ref), name, self.files.tokenizer(ref), stop_ids, ref)

    def own(self, source: Model, student: Model, arm: ArmConfig, seed: int) -> Stage:
        """Text that a model wrote, in the tokens of the student."""
        changes = {name: getattr(arm, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        options = replace(
            self.config.sample,
            model=source.ref,
            seed=seed,
            stop_ids=source.stop_ids,
            **self._shared(self.config.sample),
            **{name: value for name, value in changes.items() if value is not None},
        )
        drawn = Stage(
            "sample",
            f"sample {source.label}, seed {seed}",
            _recipe(options, "batch_size") | {"seed": seed},
            {"model": source.mark, "tokenizer": source.tokenizer},
            lambda out: sample(replace(options, out=str(out))),
            *_size(source, options.samples * options.max_tokens, options.max_tokens, passes=1),
        )
        if arm.native:
            return drawn
        return Stage(
            "retokenise",
            f"carry text of {source.label}, seed {seed}, to the tokens of {student.label}",
            {"stop_id": _stop_id(student)},
            {"corpus": drawn, "tokenizer": student.tokenizer},
            lambda out: corpora.retokenise(self.root / drawn.name, student.home, out, stop_id=_stop_id(student)),
        )

    def text(self, student: Model, arm: ArmConfig) -> Stage:
        """Real text in the tokens of a student."""
        options = ImportConfig(source=arm.text, model=student.home, stop_id=_stop_id(student))
        return Stage(
            "import",
            f"import {Path(arm.text).name} in the tokens of {student.label}",
            {"stop_id": options.stop_id},
            {"text": self.files.text(arm.text), "tokenizer": student.tokenizer},
            lambda out: corpora.import_text(replace(options, out=str(out))),
        )

    def shuffle(self, student: Model, corpus: Stage, seed: int) -> Stage:
        """A corpus with the tokens of every document in random order."""
        return Stage(
            "shuffle",
            f"shuffle the tokens of what {student.label} wrote, seed {seed}",
            {"seed": seed},
            {"corpus": corpus},
            lambda out: corpora.shuffle(self.root / corpus.name, student.ref, out, seed),
        )

    def scrub(self, student: Model, corpus: Stage, seed: int, *, companion: bool) -> Stage:
        """A corpus without what it shows of the held-out half of the sequences, or without as much other text."""
        options = replace(self.config.extract, model=student.ref)
        window, length = scoring.window_of(options), options.overlap
        mark = scoring.sequences_fingerprint(options.sequences)

        def make(out: Path) -> None:
            found, _ = scoring.read_sets(replace(options, model=student.home))
            held_out = found.tokens[scoring.assigned_to_h(mark, found.index), window.prefix :]
            folder = self.root / corpus.name
            if companion:
                corpora.drop_others(folder, held_out, out, seed=seed, length=length)
            else:
                corpora.scrub(folder, held_out, out, length=length)

        what = "with as much dropped as is held out" if companion else "without what is held out"
        return Stage(
            "companion" if companion else "scrub",
            f"what {student.label} wrote, seed {seed}, {what}",
            _recipe(options, *_NOT_THE_WINDOW) | ({"seed": seed} if companion else {}),
            {"corpus": corpus, "sequences": mark, "tokenizer": student.tokenizer},
            make,
        )

    def train(self, start: Model, on: Sequence[Stage], arm: ArmConfig, seed: int, steps: int | None = None) -> Model:
        """The student after the recipe of the study, or after so many steps of it without evaluation on the way."""
        recipe = measured_on_the_way(self.config.train, self.config.score, self.config.extract)
        if steps is not None:
            recipe = replace(recipe, steps=steps, **_UNMEASURED)
        changes = {name: getattr(arm, name) for name in ("learning_rate", "packing")}
        last, earlier = on[-1], on[:-1]
        options = replace(
            recipe,
            model=start.ref,
            corpus=str(self.root / last.name),
            mix=tuple(f"{self.root / one.name}={1 / len(on):.9f}" for one in earlier),
            seed=seed,
            max_epochs=recipe.max_epochs or 1.0,
            sign_flip=arm.sign_flip,
            **self._shared(recipe),
            **{name: value for name, value in changes.items() if value is not None},
        )
        files = (
            *options.eval_texts,
            *options.eval_tasks,
            *([options.eval_sequences] if options.eval_sequences else []),
        )
        stage = Stage(
            "train",
            f"train {start.label} on {last.label}" + (f" ({arm.name})" if arm.name else ""),
            _recipe(options, "mix", "eval_texts", "eval_tasks", "eval_sequences", "wandb") | {"seed": seed},
            {
                "model": start.mark,
                **{f"corpus {number}": one for number, one in enumerate(on)},
                **{f"measured {number}": self.files.measured(file) for number, file in enumerate(files)},
            },
            lambda out: train(replace(options, out=str(out))),
            *_size(start, (options.steps or 0) * options.batch_size * options.seq_len, options.seq_len, passes=3),
        )
        label = f"{start.label} after {arm.name or 'its own text'}, seed {seed}"
        return replace(start, ref=str(self.root / stage.name), mark=stage, label=label)

    def noise(self, base: Model, trained: Model, arm: ArmConfig, seed: int) -> Model:
        """The base with noise as long as the change of training, times the arm's weight."""
        weight = 1.0 if arm.weight is None else arm.weight
        stage = Stage(
            "noise",
            f"{base.label} with noise of {weight:g} times the change, seed {seed}",
            {"seed": seed} | ({} if weight == 1 else {"weight": weight}),
            {"base": base.mark, "student": trained.mark},
            lambda out: _once(out, lambda folder: hub.add_noise(base.ref, trained.ref, folder, seed, weight)),
        )
        return replace(base, ref=str(self.root / stage.name / "model"), mark=stage, label=stage.label)

    def merge(self, base: Model, trained: Model, arm: ArmConfig) -> Model:
        """A point on the line through the base and the trained student."""
        options = MergeConfig(base=base.ref, student=trained.ref, weight=arm.weight)
        stage = Stage(
            "merge",
            f"{base.label} merged with {trained.label} at {arm.weight}",
            {"weight": arm.weight},
            {"base": base.mark, "student": trained.mark},
            lambda out: _once(out, lambda folder: hub.merge(replace(options, out=str(folder)))),
        )
        return replace(base, ref=str(self.root / stage.name / "model"), mark=stage, label=stage.label)

    def score(self, model: Model) -> Stage:
        """What a model can do."""
        options = replace(self.config.score, model=model.ref, **self._shared(self.config.score))
        # By name and content, not by place: a study may be moved with its files.
        references = (*options.tasks, *options.texts)
        files = {f"{n}: {Path(path).name}": self.files.measured(path) for n, path in enumerate(references)}
        return Stage(
            "score",
            f"score {model.label}",
            _recipe(options, "tasks", "texts", "batch_tokens"),
            {"model": model.mark, "tokenizer": model.tokenizer, **files},
            lambda out: scoring.score(replace(options, out=str(out / "score.json"))),
        )

    def extract(self, model: Model, corpus: Stage | None) -> Stage:
        """What a model reproduces of the sequences, which are divided by what a corpus showed of them."""
        folder = "" if corpus is None else str(self.root / corpus.name)
        options = replace(self.config.extract, corpus=folder)
        return self._extract(
            model, options, f"extract from {model.label}", {} if corpus is None else {"corpus": corpus}
        )

    def extract_as(self, model: Model, form: FormatConfig) -> Stage:
        """The same, asked for in another format."""
        window = scoring.window_of(self.config.extract)
        usual = replace(self.config.extract, protocol=None, prefix=window.prefix, suffix=window.suffix)
        changes = {name: value for name in FORMAT if (value := getattr(form, name)) is not None}
        return self._extract(model, replace(usual, **changes), f"extract from {model.label}, {form.name}", {})

    def extract_again(self, model: Model) -> dict[str, Stage]:
        """The same once more, on the same model, in ways that should not matter."""
        options = self.config.extract
        dtype = self.config.dtype or options.dtype
        other = "bfloat16" if dtype == "float32" else "float32"
        tokens = _FEW_ROWS * (scoring.window_of(options).length + 1)
        ways: dict[str, dict[str, Any]] = {
            f"{_FEW_ROWS} rows at once": {"batch_tokens": tokens},
            f"in {other}": {"dtype": other},
        }
        return {
            way: self._extract(model, options, f"extract from {model.label}, {way}", {"again": way}, **changes)
            for way, changes in ways.items()
        }

    def extract_continuations(self, model: Model, continuations: Stage) -> Stage:
        """How many of a base's own continuations a model follows."""
        return self._extract(
            model,
            replace(self.config.extract, offset=0, random_offset=False, limit=None, controls="", duplicates=""),
            f"continuations that {model.label} follows",
            {"sequences": continuations},
            sequences=str(self.root / continuations.name / CONTINUATIONS),
        )

    def _extract(
        self, model: Model, options: ExtractConfig, label: str, inputs: dict[str, str | Stage], **changes: Any
    ) -> Stage:
        options = replace(options, model=model.ref, free_running=False, **{**self._shared(options), **changes})
        given = inputs.get("sequences") or scoring.sequences_fingerprint(options.sequences)
        return Stage(
            "extract",
            label,
            _recipe(options, "sequences", "batch_tokens"),
            {"model": model.mark, "tokenizer": model.tokenizer, **inputs, "sequences": given},
            lambda out: scoring.extract(replace(options, out=str(out / "extract.json"))),
        )

    def continuations(self, base: Model) -> Stage:
        """A base's own continuations of text that nobody was trained on."""
        options = replace(self.config.extract, model=base.ref, **self._shared(self.config.extract))
        asked = self.config.memorisation
        texts, n = asked.never_trained, asked.never_trained_sequences
        return Stage(
            "continue",
            f"continue {Path(texts).name} by {base.label}",
            _recipe(options, *_NOT_THE_WINDOW)
            | {"sequences": n, "start_token": options.start_token, "dtype": options.dtype},
            {"model": base.mark, "tokenizer": base.tokenizer, "texts": self.files.measured(texts)},
            lambda out: write_continuations(options, texts, n, out),
        )

    def relearn(self, student: Model, seed: int) -> Model:
        """A model after a moment of text that has nothing to do with the sequences."""
        asked = self.config.memorisation
        text = self.text(student, ArmConfig("relearning", "text", text=asked.relearn_text))
        return self.train(student, [text], ArmConfig("relearning"), seed, asked.relearn_steps)

    def proxies(self, student: Model, source: Model, corpus: Stage, seed: int) -> tuple[Stage, Stage]:
        """What a corpus is to a student before training, and as it was drawn to its source."""
        drawn = self.own(source, student, ArmConfig("", native=True), seed)
        return self._proxy(student, corpus, self.config.embedding_model), self._proxy(source, drawn)

    def _proxy(self, reader: Model, corpus: Stage, embedder: str = "") -> Stage:
        options = replace(self.config.score, **self._shared(self.config.score))
        documents, vectors = self.config.proxy_documents, {}
        if embedder:
            vectors = {"embedder": self.files.model(embedder), "embedder's tokenizer": self.files.tokenizer(embedder)}
        return Stage(
            "proxies",
            f"what {corpus.label} is to {reader.label}",
            {"documents": documents, "dtype": options.dtype, "limit": options.limit},
            {
                "corpus": corpus,
                "model": reader.mark,
                "tokenizer": reader.tokenizer,
                **{f"task {n}": self.files.measured(path) for n, path in enumerate(options.tasks)},
                **vectors,
            },
            lambda out: measure_corpus(
                self.root / corpus.name, reader.ref, options, out, documents=documents, embedder=embedder
            ),
        )

    def _shared(self, section: Any) -> dict[str, Any]:
        return {"mesh": section.mesh or self.config.mesh, "dtype": self.config.dtype or section.dtype}


def _size(model: Model, tokens: int, length: int, *, passes: int) -> tuple[int, float]:
    """Tokens in rows of a length, and the FLOPs of so many passes over them (a backward pass counts for two)."""
    decoder, _ = hub.read_config(model.home)
    return tokens, tokens * training.flops_per_token(decoder, length) * passes / 3


def _stop_id(student: Model) -> int | None:
    """The token that ends documents for a student; None: its tokenizer's EOS."""
    return student.stop_ids[0] if student.stop_ids else None


def _once(folder: Path, make: Callable[[Path], object]) -> None:
    """Make the model in a stage's folder; a whole one that is there already was finished just before a kill."""
    if not (folder / "model").exists():
        make(folder / "model")


def _recipe(options: SampleConfig | TrainConfig | ScoreConfig | ExtractConfig, *left_out: str) -> dict[str, Any]:
    """The options that decide a stage's result; files stand among its inputs by their content."""
    return {name: value for name, value in settings.to_dict(options).items() if name not in (*_PLACES, *left_out)}
