"""The cells of a study, and the stages that each of them needs.

A **cell** is a student after one treatment with one seed: trained on a source's text (the matrix), or an arm. Every
corpus reaches its student through text (`corpus.retokenize`), the student's own included; an arm may keep the native
tokens. All cells have the one recipe of the study: the same steps, batch and learning rate, the last step's weights,
never more than one pass. Only what makes an arm an arm differs.

Nothing is read here but configs, tokenizers and fingerprints: the plan is made before anything is done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jax_selftrain.config import ArmConfig, ModelConfig, StudyConfig
from jax_selftrain.errors import InputError
from jax_selftrain.study.dag import Stage, topological_order
from jax_selftrain.study.measure_names import RELEARNED, UNSEEN
from jax_selftrain.study.stage_factory import StageFactory, StudyModel

MAIN_EFFECT = "text of "
"""A cell of the matrix is called `text of SOURCE`."""

ProbeStages = Mapping[str, Stage]
"""Extractions beside the one that every study has, by what they are called."""


@dataclass(frozen=True)
class StudyCell:
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
    probes: ProbeStages = field(default_factory=dict)
    proxies: tuple[Stage, Stage] | None = None
    """What the corpus is to the student before training, and to the source as it was drawn; of the matrix alone."""


@dataclass(frozen=True)
class Design:
    """The whole plan."""

    models: Mapping[str, ModelConfig]
    students: tuple[str, ...]
    sources: tuple[str, ...]
    cells: tuple[StudyCell, ...]
    score_base: Mapping[str, Stage]
    extract_base: Mapping[str, Stage]
    views_base: Mapping[tuple[str, int], ProbeStages]
    """Of each student and seed: the base in every view that its cells have."""
    aa_repeats: Mapping[str, ProbeStages]
    """Of each student: the base measured again in ways that should not matter."""
    base_model: Path

    @property
    def ordered_stages(self) -> list[Stage]:
        """Everything that is to be done, in an order in which it can be."""
        wanted: list[Stage] = [*self.score_base.values(), *self.extract_base.values()]
        for views in (*self.views_base.values(), *self.aa_repeats.values()):
            wanted += views.values()
        for cell in self.cells:
            parts = (cell.corpus, cell.train, cell.score, cell.extract, *cell.probes.values(), *(cell.proxies or ()))
            wanted += [one for one in parts if one is not None]
        return topological_order(wanted)

    def folder(self, stage: Stage) -> Path:
        return self.base_model / stage.name


def make_design(config: StudyConfig) -> Design:
    """All cells of a study.

    Raises:
        InputError: a model is not there, a name is unknown or used twice, or options do not belong together.
    """
    return _Builder(config).design()


class _Builder:
    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.kinds = StageFactory(config)
        self.models = {model.name: model for model in config.models}
        self.students = config.students or tuple(self.models)
        self.sources = config.sources or self.students
        self.scored = bool(config.score.tasks or config.score.texts)
        self.extracted = bool(config.extract.sequences)

    def design(self) -> Design:
        config = self.config
        cells = [
            self._cell(student, f"{MAIN_EFFECT}{source}", source, seed, ArmConfig(f"{MAIN_EFFECT}{source}"))
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
        bases = {name: self.kinds.base(name) for name in dict.fromkeys((*self.students, *self.sources))}
        students = {name: bases[name] for name in self.students} if self.extracted else {}
        again = students if config.memorization.aa_repeat else {}
        return Design(
            models=self.models,
            students=self.students,
            sources=self.sources,
            cells=tuple(cells),
            score_base={name: self.kinds.score(base) for name, base in bases.items()} if self.scored else {},
            extract_base={name: self.kinds.extract(base, None) for name, base in students.items()},
            views_base={
                (name, seed): self._views(base, base, seed) for name, base in students.items() for seed in config.seeds
            },
            aa_repeats={name: self.kinds.extract_aa(base) for name, base in again.items()},
            base_model=self.kinds.root,
        )

    # ------------------------------------------------------------ cells

    def _cell(self, student: str, treatment: str, source: str, seed: int, arm: ArmConfig) -> StudyCell:
        base = self.kinds.base(student)
        teacher = self.kinds.base(source) if source else base
        corpus: Stage | None
        trained: Stage | None = None
        if arm.kind == "generations":
            after, corpus, trained = self._train_generations(base, arm, seed)
        elif arm.kind in ("noise", "extrapolate"):
            corpus = self.kinds.sample_and_retokenize(base, base, ArmConfig(""), seed)
            usual = self.kinds.train(base, [corpus], ArmConfig(""), seed)
            if arm.kind == "noise":
                corpus, after = None, self.kinds.noise(base, usual, arm, seed)
            else:
                after = self.kinds.merge(base, usual, arm)
        else:
            corpus = (
                self.kinds.import_text(base, arm)
                if arm.kind == "text"
                else self.kinds.sample_and_retokenize(teacher, base, arm, seed)
            )
            if arm.kind == "shuffled":
                corpus = self.kinds.shuffle(base, corpus, seed)
            elif arm.kind in ("scrubbed", "size_matched"):
                corpus = self.kinds.scrub(base, corpus, seed, companion=arm.kind == "size_matched")
            after = self.kinds.train(base, [corpus], arm, seed)
            trained = after.fingerprint if isinstance(after.fingerprint, Stage) else None
        predicted = treatment.startswith(MAIN_EFFECT) and len(self.sources) > 1 and self.config.proxy_sample_size > 0
        return StudyCell(
            student,
            treatment,
            source,
            seed,
            corpus,
            trained,
            score=self.kinds.score(after) if self.scored else None,
            extract=self.kinds.extract(after, corpus) if self.extracted else None,
            probes=self._views(base, after, seed) if self.extracted else {},
            proxies=self.kinds.proxies(base, teacher, corpus, seed) if corpus and predicted else None,
        )

    def _views(self, base: StudyModel, model: StudyModel, seed: int) -> ProbeStages:
        """The other ways in which the memory of a model, which is made of a base, is looked at."""
        asked = self.config.memorization
        found = {form.name: self.kinds.extract_in_format(model, form) for form in asked.formats}
        if asked.unseen_text:
            found[UNSEEN] = self.kinds.extract_continuations(model, self.kinds.continuations(base))
        if asked.relearn_corpus:
            found[RELEARNED] = self.kinds.extract(self.kinds.relearn(model, seed), None)
        return found

    def _train_generations(self, base: StudyModel, arm: ArmConfig, seed: int) -> tuple[StudyModel, Stage, Stage]:
        student, written = base, []
        for generation in range(arm.generations):
            # A generation of its own words: those of the first are the words of every other arm.
            written.append(
                self.kinds.sample_and_retokenize(
                    student, base, arm, seed if generation == 0 else _generation_seed(seed, generation)
                )
            )
            used = written if arm.replay == "accumulate" else written[-1:]
            start = student if arm.replay == "fresh" else base
            student = self.kinds.train(start, used, arm, seed)
        if not isinstance(student.fingerprint, Stage):
            raise InputError(f"arm {arm.name}: `generations` must be at least 1, not {arm.generations}")
        return student, written[-1], student.fingerprint


def _generation_seed(seed: int, generation: int) -> int:
    """A seed of its own for each generation."""
    return int.from_bytes(hashlib.sha256(f"generation {generation} of seed {seed}".encode()).digest()[:4])
