"""The cells of a study and the stages of each cell.

A **cell** is a student after one treatment with one seed: training on a source's text, or an arm. All cells have the
recipe of the study: the same steps, batch and learning rate, and the weights of the last step; an arm changes only what
it names. Every corpus reaches its student through text (`corpus.retokenize`), the student's own text included, unless
`keep_source_tokens` is set.

The design reads configs, tokenizers and fingerprints, and exists before any stage runs.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from jax_selftrain.config import ArmConfig, ModelConfig, PairConfig, StudyConfig
from jax_selftrain.corpus import Corpus
from jax_selftrain.errors import InputError
from jax_selftrain.study.dag import Stage, topological_order
from jax_selftrain.study.measure_names import MAIN_EFFECT, expand_generations
from jax_selftrain.study.proxy_stages import ProxyStages, make_proxy_stages
from jax_selftrain.study.stage_factory import StageFactory
from jax_selftrain.study.study_model import StudyModel
from jax_selftrain.study.weight_changes import change_weights

ProbeStages = Mapping[str, Stage]
"""Further extractions of a model, by name."""


@dataclass(frozen=True)
class StudyCell:
    """A student after one treatment with one seed."""

    student: str
    treatment: str
    """`source NAME`, or the name of an arm or of one of its generations."""
    source: str
    """The model that wrote the corpus; empty for real text and noise."""
    seed: int
    corpus: Stage | None
    """The last corpus it was trained on."""
    train: Stage | None
    """None for noise and merges."""
    score: Stage | None
    extract: Stage | None
    probes: ProbeStages
    proxies: ProxyStages | None
    """None for arms."""


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
    hash_inputs: Callable[[], dict[str, str]]
    """Hashes of all files and models of the study, by option."""
    root: Path
    """Folder of the stages."""
    read_corpus: Callable[[Stage], Corpus]
    """`StageFactory.read_corpus`."""

    @property
    def ordered_stages(self) -> list[Stage]:
        """All stages, dependencies first.

        The bases are scored before anything is sampled. The cells of one seed and student follow each other, because
        they read the same models.
        """
        seeds = list(dict.fromkeys(cell.seed for cell in self.cells))
        wanted: list[Stage | None] = [*self.score_base.values(), *self.extract_base.values()]
        for probes in (*self.base_probes.values(), *self.aa_repeats.values()):
            wanted += probes.values()
        for cell in sorted(self.cells, key=lambda cell: (seeds.index(cell.seed), self.students.index(cell.student))):
            wanted += (cell.corpus, cell.train, cell.score, cell.extract, *cell.probes.values(), *(cell.proxies or ()))
        return topological_order(stage for stage in wanted if stage is not None)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The (student, source) of the main cells."""
        main = (cell for cell in self.cells if cell.treatment == f"{MAIN_EFFECT}{cell.source}")
        return list(dict.fromkeys((cell.student, cell.source) for cell in main))

    def folder(self, stage: Stage) -> Path:
        """Return the folder of a stage."""
        return self.root / stage.name


def expand_revisions(config: StudyConfig) -> StudyConfig:
    """Replace each model with `revisions` by one model for each of them.

    Lists of models that name it name all of them then; a pair of it with itself is each with itself. Raises InputError
    if its reference has a revision already.
    """
    found = {model.name: [f"{model.name}@{one}" for one in model.revisions] or [model.name] for model in config.models}

    def expand(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(one for name in names for one in found.get(name, [name]))

    models: list[ModelConfig] = []
    for model in config.models:
        if model.revisions and (Path(model.model).exists() or "@" in model.model):
            raise InputError(f"models: {model.name}: {model.model} has no `revisions`; give a hub id without `@`")
        lineage = model.lineage or (model.name if model.revisions else "")
        models += [
            replace(model, name=f"{model.name}@{one}", model=f"{model.model}@{one}", lineage=lineage, revisions=())
            for one in model.revisions
        ] or [model]
    return replace(
        config,
        models=tuple(models),
        students=expand(config.students),
        sources=expand(config.sources),
        pairs=tuple(
            PairConfig(student, source)
            for pair in config.pairs
            for student in expand([pair.student])
            for source in ([student] if pair.source == pair.student else expand([pair.source]))
        ),
        arms=tuple(replace(arm, students=expand(arm.students)) for arm in config.arms),
    )


def make_design(config: StudyConfig, read_corpus: Callable[[str], Corpus] | None = None) -> Design:
    """Make all cells of a study.

    `read_corpus` is a cache of `open_corpus`. Raises InputError if a model does not exist, or options conflict.
    """
    stages = StageFactory(config, read_corpus)
    models = {model.name: model for model in config.models}
    students = config.students or tuple(models)
    sources = config.sources or students
    cells = [
        _make_cell(stages, ArmConfig(f"{MAIN_EFFECT}{source}"), student, source, seed, predict=len(sources) > 1)
        for seed in config.seeds
        for student in students
        for source in sources
        if not config.pairs or PairConfig(student, source) in config.pairs
    ]
    cells += [
        _make_cell(stages, arm, student, "" if arm.kind in ("text", "noise") else student, seed)
        for seed in config.seeds
        for arm in expand_generations(config.arms)
        for student in students
        if not arm.students or student in arm.students
    ]
    # A single source has nothing to be compared with: it is scored only if it is a student.
    compared = [name for name in sources if models[name].score] if len(sources) > 1 else []
    scored = dict.fromkeys((*students, *compared)) if stages.is_scored else {}
    bases = {name: stages.base(name) for name in students} if stages.is_extracted else {}
    repeated = bases if config.memorization.aa_repeat else {}
    return Design(
        models=models,
        students=students,
        sources=sources,
        cells=tuple(cells),
        score_base={name: stages.score(stages.base(name)) for name in scored},
        extract_base={name: stages.extract(base) for name, base in bases.items()},
        base_probes={
            (name, seed): stages.extract_probes(b, b, seed) for name, b in bases.items() for seed in config.seeds
        },
        aa_repeats={name: stages.extract_aa(base) for name, base in repeated.items()},
        hash_inputs=partial(stages.hashes.study, config),
        root=stages.root,
        read_corpus=stages.read_corpus,
    )


def _make_cell(
    stages: StageFactory, arm: ArmConfig, student: str, source: str, seed: int, *, predict: bool = False
) -> StudyCell:
    base = stages.base(student)
    writer = stages.base(source) if source else base
    after, corpora = _treat(stages, base, writer, arm, seed)
    made, corpus = after.fingerprint, corpora[-1] if corpora else None
    return StudyCell(
        student,
        arm.name,
        source,
        seed,
        corpus,
        train=made if isinstance(made, Stage) and made.command == "train" else None,
        score=stages.score(after) if stages.is_scored else None,
        extract=stages.extract(after, corpora, base) if stages.is_extracted else None,
        probes=stages.extract_probes(base, after, seed) if stages.is_extracted else {},
        proxies=make_proxy_stages(stages, base, corpus, writer, seed) if predict and corpus is not None else None,
    )


def _treat(
    stages: StageFactory, base: StudyModel, writer: StudyModel, arm: ArmConfig, seed: int
) -> tuple[StudyModel, list[Stage]]:
    """Return the treated student and all corpora that it was trained on."""
    if arm.kind in ("noise", "extrapolate"):
        usual, corpora = _treat(stages, base, base, ArmConfig(), seed)
        return change_weights(stages, base, usual, arm, seed), corpora if arm.kind == "extrapolate" else []
    model, corpora, used = base, list[Stage](), list[Stage]()
    for generation in range(arm.generations if arm.kind == "generations" else 1):
        # The first generation shares its corpus with the other arms.
        key = f"generation {generation} of seed {seed}".encode()
        own_seed = int.from_bytes(hashlib.sha256(key).digest()[:4]) if generation else seed
        corpora.append(_write_corpus(stages, base, writer, arm, own_seed))
        used = corpora[:] if arm.replay == "accumulate" else corpora[-1:]
        if arm.kind == "mixture":
            used = [stages.import_text(base, arm), *used]
        model = writer = stages.train(model if arm.replay == "fresh" else base, used, arm, seed)
    return model, corpora if arm.replay == "fresh" else used


def _write_corpus(stages: StageFactory, base: StudyModel, writer: StudyModel, arm: ArmConfig, seed: int) -> Stage:
    if arm.kind == "text":
        return stages.draw_subset(stages.import_text(base, arm), f"{arm.name} for {base.label}", seed)
    corpus = stages.sample_for(base, writer, arm, seed)
    if arm.kind == "shuffled":
        return stages.shuffle(base, corpus, seed)
    if arm.kind in ("decontaminated", "size_matched"):
        return stages.decontaminate(base, corpus, seed, size_matched=arm.kind == "size_matched")
    return corpus
