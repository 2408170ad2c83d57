"""The cells of a study, and the stages that each of them needs.

A **cell** is a student after one treatment with one seed: trained on a source's text (the matrix), or an arm. Every
corpus reaches its student through text (`corpus.retokenise`), the student's own included; an arm may keep the native
tokens. All cells have the one recipe of the study: the same steps, batch and learning rate, the last step's weights,
never more than one pass. Only what makes an arm an arm differs.

Nothing is read here but configs, tokenizers and fingerprints: the plan is made before anything is done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax_selftrain import corpus as corpora
from jax_selftrain import hub, scoring, settings
from jax_selftrain.config import (
    ArmConfig,
    ExtractConfig,
    ImportConfig,
    MergeConfig,
    ModelConfig,
    SampleConfig,
    ScoreConfig,
    StudyConfig,
    TrainConfig,
)
from jax_selftrain.errors import InputError
from jax_selftrain.sampling import sample
from jax_selftrain.study.evaluate import train
from jax_selftrain.study.fingerprints import Fingerprints
from jax_selftrain.study.plan import measured_on_the_way
from jax_selftrain.study.proxies import measure_corpus
from jax_selftrain.study.stages import Stage, in_order

MATRIX = "text of "
"""A cell of the matrix is called `text of SOURCE`."""

_PLACES = ("model", "corpus", "out", "mesh", "seed")
"""Options that say where, or that stand among a stage's inputs."""


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


@dataclass(frozen=True)
class Cell:
    """A student after one treatment with one seed."""

    student: str
    treatment: str
    """`text of SOURCE`, or the name of an arm."""
    source: str
    """The model whose text it was trained on; empty for real text and noise."""
    seed: int
    corpus: Stage | None
    """What it was trained on last."""
    train: Stage | None
    """None where nothing was trained."""
    score: Stage | None
    extract: Stage | None
    proxies: tuple[Stage, Stage] | None = None
    """What the corpus is to the student before training, and to the source as it was drawn; of the matrix alone."""


@dataclass(frozen=True)
class Design:
    """The whole plan."""

    models: Mapping[str, ModelConfig]
    students: tuple[str, ...]
    sources: tuple[str, ...]
    cells: tuple[Cell, ...]
    score_base: Mapping[str, Stage]
    extract_base: Mapping[str, Stage]
    root: Path

    @property
    def stages(self) -> list[Stage]:
        """Everything that is to be done, in an order in which it can be."""
        wanted: list[Stage] = [*self.score_base.values(), *self.extract_base.values()]
        for cell in self.cells:
            parts = (cell.corpus, cell.train, cell.score, cell.extract, *(cell.proxies or ()))
            wanted += [one for one in parts if one is not None]
        return in_order(wanted)

    def folder(self, stage: Stage) -> Path:
        return self.root / stage.name


def make_design(config: StudyConfig) -> Design:
    """All cells of a study.

    Raises:
        InputError: a model is not there, a name is unknown or used twice, or options do not belong together.
    """
    return _Builder(config).design()


class _Builder:
    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.root = Path(config.out) / "stages"
        self.models = {model.name: model for model in config.models}
        self.students = config.students or tuple(self.models)
        self.sources = config.sources or self.students
        self.files = Fingerprints()

    def design(self) -> Design:
        config = self.config
        cells = [
            self._cell(student, f"{MATRIX}{source}", source, seed, ArmConfig(f"{MATRIX}{source}"))
            for seed in config.seeds
            for student in self.students
            for source in self.sources
        ]
        cells += [
            self._cell(student, arm.name, "" if arm.kind in ("text", "noise") else student, seed, arm)
            for seed in config.seeds
            for arm in config.arms
            for student in self.students
            if not arm.students or student in arm.students
        ]
        scored, extracted = self._scored, bool(config.extract.sequences)
        bases = {name: self._base(name) for name in dict.fromkeys((*self.students, *self.sources))}
        return Design(
            models=self.models,
            students=self.students,
            sources=self.sources,
            cells=tuple(cells),
            score_base={name: self._score(base) for name, base in bases.items()} if scored else {},
            extract_base={name: self._extract(bases[name], None) for name in self.students} if extracted else {},
            root=self.root,
        )

    # ------------------------------------------------------------ cells

    def _cell(self, student: str, treatment: str, source: str, seed: int, arm: ArmConfig) -> Cell:
        base = self._base(student)
        teacher = self._base(source) if source else base
        corpus: Stage | None
        trained: Stage | None = None
        if arm.kind == "generations":
            after, corpus, trained = self._generations(base, arm, seed)
        elif arm.kind in ("noise", "extrapolated"):
            corpus = self._own(base, base, ArmConfig(""), seed)
            usual = self._train(base, [corpus], ArmConfig(""), seed)
            after = self._noise(base, usual, arm, seed) if arm.kind == "noise" else self._merge(base, usual, arm)
            if arm.kind == "noise":
                corpus = None
        else:
            corpus = self._text(base, arm) if arm.kind == "text" else self._own(teacher, base, arm, seed)
            if arm.kind == "shuffled":
                corpus = self._shuffle(base, corpus, seed)
            after = self._train(base, [corpus], arm, seed)
            trained = after.mark if isinstance(after.mark, Stage) else None
        return Cell(
            student,
            treatment,
            source,
            seed,
            corpus,
            trained,
            self._score(after) if self._scored else None,
            self._extract(after, corpus) if self.config.extract.sequences else None,
            self._proxies(base, teacher, corpus, seed) if treatment == f"{MATRIX}{source}" else None,
        )

    @property
    def _scored(self) -> bool:
        return bool(self.config.score.tasks or self.config.score.texts)

    def _generations(self, base: Model, arm: ArmConfig, seed: int) -> tuple[Model, Stage, Stage]:
        student, written = base, []
        for generation in range(arm.generations):
            # A generation of its own words: those of the first are the words of every other arm.
            written.append(self._own(student, base, arm, seed if generation == 0 else _derived(seed, generation)))
            used = written if arm.mode == "accumulated" else written[-1:]
            start = student if arm.mode == "fresh" else base
            student = self._train(start, used, arm, seed)
        if not isinstance(student.mark, Stage):
            raise InputError(f"arm {arm.name}: `generations` must be at least 1, not {arm.generations}")
        return student, written[-1], student.mark

    def _base(self, name: str) -> Model:
        ref, stop_ids = self.models[name].model, self.models[name].stop_ids
        return Model(ref, self.files.model(ref), name, self.files.tokenizer(ref), stop_ids, ref)

    # ------------------------------------------------------------ stages

    def _own(self, source: Model, student: Model, arm: ArmConfig, seed: int) -> Stage:
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
            options.samples * options.max_tokens,
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

    def _text(self, student: Model, arm: ArmConfig) -> Stage:
        options = ImportConfig(source=arm.text, model=student.ref, stop_id=_stop_id(student))
        return Stage(
            "import",
            f"import {Path(arm.text).name} in the tokens of {student.label}",
            {"stop_id": options.stop_id},
            {"text": self.files.text(arm.text), "tokenizer": student.tokenizer},
            lambda out: corpora.import_text(replace(options, out=str(out))),
        )

    def _shuffle(self, student: Model, corpus: Stage, seed: int) -> Stage:
        return Stage(
            "shuffle",
            f"shuffle the tokens of what {student.label} wrote, seed {seed}",
            {"seed": seed},
            {"corpus": corpus},
            lambda out: corpora.shuffle(self.root / corpus.name, student.ref, out, seed),
        )

    def _train(self, start: Model, on: Sequence[Stage], arm: ArmConfig, seed: int) -> Model:
        recipe = measured_on_the_way(self.config.train, self.config.score, self.config.extract)
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
            (options.steps or 0) * options.batch_size * options.seq_len,
        )
        label = f"{start.label} after {arm.name or 'its own text'}, seed {seed}"
        return replace(start, ref=str(self.root / stage.name), mark=stage, label=label)

    def _noise(self, base: Model, trained: Model, arm: ArmConfig, seed: int) -> Model:
        weight = 1.0 if arm.weight is None else arm.weight
        stage = Stage(
            "noise",
            f"{base.label} with noise of {weight:g} times the change, seed {seed}",
            {"seed": seed} | ({} if weight == 1 else {"weight": weight}),
            {"base": base.mark, "student": trained.mark},
            lambda out: _once(out, lambda folder: hub.add_noise(base.ref, trained.ref, folder, seed, weight)),
        )
        return replace(base, ref=str(self.root / stage.name / "model"), mark=stage, label=stage.label)

    def _merge(self, base: Model, trained: Model, arm: ArmConfig) -> Model:
        options = MergeConfig(base=base.ref, student=trained.ref, weight=arm.weight)
        stage = Stage(
            "merge",
            f"{base.label} merged with {trained.label} at {arm.weight}",
            {"weight": arm.weight},
            {"base": base.mark, "student": trained.mark},
            lambda out: _once(out, lambda folder: hub.merge(replace(options, out=str(folder)))),
        )
        return replace(base, ref=str(self.root / stage.name / "model"), mark=stage, label=stage.label)

    def _score(self, model: Model) -> Stage:
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

    def _extract(self, model: Model, corpus: Stage | None) -> Stage:
        folder = "" if corpus is None else str(self.root / corpus.name)
        options = replace(self.config.extract, model=model.ref, corpus=folder, **self._shared(self.config.extract))
        return Stage(
            "extract",
            f"extract from {model.label}",
            _recipe(options, "sequences", "batch_tokens"),
            {
                "model": model.mark,
                "tokenizer": model.tokenizer,
                "sequences": scoring.sequences_fingerprint(options.sequences),
                **({} if corpus is None else {"corpus": corpus}),
            },
            lambda out: scoring.extract(replace(options, out=str(out / "extract.json"))),
        )

    def _proxies(self, student: Model, source: Model, corpus: Stage | None, seed: int) -> tuple[Stage, Stage] | None:
        if len(self.sources) < 2 or not self.config.proxy_documents or corpus is None:
            return None
        drawn = self._own(source, student, ArmConfig("", native=True), seed)
        return self._proxy(student, corpus), self._proxy(source, drawn)

    def _proxy(self, reader: Model, corpus: Stage) -> Stage:
        options = replace(self.config.score, **self._shared(self.config.score))
        documents = self.config.proxy_documents
        return Stage(
            "proxies",
            f"what {corpus.label} is to {reader.label}",
            {"documents": documents, "dtype": options.dtype, "limit": options.limit},
            {
                "corpus": corpus,
                "model": reader.mark,
                "tokenizer": reader.tokenizer,
                **{f"task {n}": self.files.measured(path) for n, path in enumerate(options.tasks)},
            },
            lambda out: measure_corpus(self.root / corpus.name, reader.ref, options, out, documents=documents),
        )

    def _shared(self, section: Any) -> dict[str, Any]:
        return {"mesh": section.mesh or self.config.mesh, "dtype": self.config.dtype or section.dtype}


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


def _derived(seed: int, generation: int) -> int:
    """A seed of its own for each generation."""
    return int.from_bytes(hashlib.sha256(f"generation {generation} of seed {seed}".encode()).digest()[:4])
