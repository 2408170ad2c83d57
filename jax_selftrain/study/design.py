"""The cells of a study and the stages of each cell.

A **cell** is a student after one treatment with one seed: training on a source's text, or an arm. All cells have the
recipe of the study: the same steps, batch and learning rate, and the weights of the last step; an arm changes only what
it names. Every corpus reaches its student through text (`corpus.retokenize`), the student's own text included, unless
`keep_source_tokens` is set.

The design reads configs, tokenizers and fingerprints, and exists before any stage runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jax_selftrain.config import ArmConfig, ModelConfig, StudyConfig
from jax_selftrain.errors import InputError
from jax_selftrain.study.dag import Stage, topological_order
from jax_selftrain.study.measure_names import AFTER_RELEARNING, MAIN_EFFECT, UNSEEN
from jax_selftrain.study.stage_factory import StageFactory, StudyModel

ProbeStages = Mapping[str, Stage]
"""Further extractions of a model, by name."""


@dataclass(frozen=True)
class StudyCell:
    """A student after one treatment with one seed."""

    student: str
    treatment: str
    """`source NAME`, or the name of an arm."""
    source: str
    """The model that wrote the corpus; empty for real text and noise."""
    seed: int
    corpus: Stage | None
    """The last corpus it was trained on."""
    train: Stage | None
    """None for noise and merges."""
    score: Stage | None
    extract: Stage | None
    probes: ProbeStages = field(default_factory=dict)
    proxies: tuple[Stage, Stage] | None = None
    """The corpus under the student before training, and under the source; not for arms."""


@dataclass(frozen=True)
class Design:
    """All cells and stages of a study."""

    models: Mapping[str, ModelConfig]
    students: tuple[str, ...]
    sources: tuple[str, ...]
    cells: tuple[StudyCell, ...]
    score_base: Mapping[str, Stage]
    extract_base: Mapping[str, Stage]
    base_probes: Mapping[tuple[str, int], ProbeStages]
    """By student and seed: the base in every probe of its cells."""
    aa_repeats: Mapping[str, ProbeStages]
    """By student: the base measured again in another batch size and dtype."""
    root: Path
    """Folder of the stages."""

    @property
    def ordered_stages(self) -> list[Stage]:
        """All stages, dependencies first; the bases are scored before anything is sampled."""
        wanted: list[Stage] = [*self.score_base.values(), *self.extract_base.values()]
        for probes in (*self.base_probes.values(), *self.aa_repeats.values()):
            wanted += probes.values()
        for cell in self.cells:
            parts = (cell.corpus, cell.train, cell.score, cell.extract, *cell.probes.values(), *(cell.proxies or ()))
            wanted += [one for one in parts if one is not None]
        return topological_order(wanted)

    def folder(self, stage: Stage) -> Path:
        """Return the folder of a stage."""
        return self.root / stage.name


def make_design(config: StudyConfig, environment: Mapping[str, Any] | None = None) -> Design:
    """Make all cells of a study.

    Args:
        config: the study.
        environment: part of every stage's key; None: `dag.numerical_environment()`.

    Raises:
        InputError: a model does not exist, or options conflict.
    """
    return _Builder(config, environment).design()


class _Builder:
    def __init__(self, config: StudyConfig, environment: Mapping[str, Any] | None) -> None:
        self.config = config
        self.stages = StageFactory(config, environment)
        self.models = {model.name: model for model in config.models}
        self.students = config.students or tuple(self.models)
        self.sources = config.sources or self.students
        self.is_scored = bool(config.score.tasks or config.score.texts)
        self.is_extracted = bool(config.extract.sequences)

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
        # A single source has nothing to be compared with: it is scored only if it is a student.
        scored = (*self.students, *(self.sources if len(self.sources) > 1 else ()))
        bases = {name: self.stages.base(name) for name in dict.fromkeys(scored)}
        students = {name: bases[name] for name in self.students} if self.is_extracted else {}
        repeated = students if config.memorization.aa_repeat else {}
        return Design(
            models=self.models,
            students=self.students,
            sources=self.sources,
            cells=tuple(cells),
            score_base={name: self.stages.score(base) for name, base in bases.items()} if self.is_scored else {},
            extract_base={name: self.stages.extract(base, None) for name, base in students.items()},
            base_probes={
                (name, seed): self._probes(base, base, seed) for name, base in students.items() for seed in config.seeds
            },
            aa_repeats={name: self.stages.extract_aa(base) for name, base in repeated.items()},
            root=self.stages.root,
        )

    def _cell(self, student: str, treatment: str, source: str, seed: int, arm: ArmConfig) -> StudyCell:
        base = self.stages.base(student)
        writer = self.stages.base(source) if source else base
        corpus: Stage | None
        trained: Stage | None = None
        if arm.kind == "generations":
            after, corpus, trained = self._train_generations(base, arm, seed)
        elif arm.kind in ("noise", "extrapolate"):
            corpus = self.stages.sample_for(base, base, ArmConfig(), seed)
            usual = self.stages.train(base, [corpus], ArmConfig(), seed)
            if arm.kind == "noise":
                corpus, after = None, self.stages.add_noise(base, usual, arm, seed)
            else:
                after = self.stages.merge(base, usual, arm)
        else:
            corpus = (
                self.stages.import_text(base, arm)
                if arm.kind == "text"
                else self.stages.sample_for(base, writer, arm, seed)
            )
            if arm.kind == "shuffled":
                corpus = self.stages.shuffle(base, corpus, seed)
            elif arm.kind in ("decontaminated", "size_matched"):
                corpus = self.stages.decontaminate(base, corpus, seed, size_matched=arm.kind == "size_matched")
            after = self.stages.train(base, [corpus], arm, seed)
            trained = after.fingerprint if isinstance(after.fingerprint, Stage) else None
        predicted = treatment.startswith(MAIN_EFFECT) and len(self.sources) > 1 and self.config.proxy_sample_size > 0
        return StudyCell(
            student,
            treatment,
            source,
            seed,
            corpus,
            trained,
            score=self.stages.score(after) if self.is_scored else None,
            extract=self.stages.extract(after, corpus, base) if self.is_extracted else None,
            probes=self._probes(base, after, seed) if self.is_extracted else {},
            proxies=self.stages.measure_proxies(base, writer, corpus, seed) if corpus and predicted else None,
        )

    def _probes(self, base: StudyModel, model: StudyModel, seed: int) -> ProbeStages:
        """Return the further extractions of a model made from a base."""
        probes = self.config.memorization
        found = {form.name: self.stages.extract_in_format(model, form) for form in probes.formats}
        if probes.unseen_text:
            found[UNSEEN] = self.stages.extract_continuations(model, self.stages.continue_unseen_text(base))
        if probes.relearn_corpus:
            found[AFTER_RELEARNING] = self.stages.extract_after_relearning(model, seed)
        return found

    def _train_generations(self, base: StudyModel, arm: ArmConfig, seed: int) -> tuple[StudyModel, Stage, Stage]:
        student, corpora = base, []
        for generation in range(arm.generations):
            # The first generation shares its corpus with the other arms.
            generation_seed = seed if generation == 0 else _generation_seed(seed, generation)
            corpora.append(self.stages.sample_for(base, student, arm, generation_seed))
            used = corpora if arm.replay == "accumulate" else corpora[-1:]
            start = student if arm.replay == "fresh" else base
            student = self.stages.train(start, used, arm, seed)
        if not isinstance(student.fingerprint, Stage):
            raise InputError(f"arm {arm.name}: `generations` must be at least 1, not {arm.generations}")
        return student, corpora[-1], student.fingerprint


def _generation_seed(seed: int, generation: int) -> int:
    """Derive the seed of a generation."""
    return int.from_bytes(hashlib.sha256(f"generation {generation} of seed {seed}".encode()).digest()[:4])
