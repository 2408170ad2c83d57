"""Options of the commands that combine stages: run, study, plan, report, demo."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypeVar

from jax_selftrain.config.commands import DType, ExtractConfig, Packing, Preset, SampleConfig, ScoreConfig, TrainConfig
from jax_selftrain.config.corpus_commands import DecontaminateConfig, SubsetConfig
from jax_selftrain.config.metadata import (
    AppliesTo,
    AtLeastOne,
    AtLeastTwo,
    Execution,
    Input,
    NonNegative,
    OneOrMore,
    OutputFile,
    OutputFolder,
    Positive,
    Required,
)

KeepModels = Literal["all", "last", "none"]


@dataclass(frozen=True)
class RunConfig:
    """Run one self-training round: sample, train, evaluate before and after, report."""

    model: Required[Input[str]] = ""
    """Base model, which is trained."""
    source: Input[str] = ""
    """Model to sample from; unset: the base."""
    out: Required[OutputFolder[str]] = ""
    """Output folder; the same command resumes it."""
    title: Execution[str] = ""
    """Title of the report; unset: derived from the model name."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """Sampling of the corpus."""
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    """Removal of benchmark overlap from the samples; skipped without `tasks` and `texts`."""
    subset: SubsetConfig = field(default_factory=SubsetConfig)
    """Subset of the samples to train on; skipped without `tokens` and `bytes`."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training of the student."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    """Capability evaluation, before and after."""
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    """Memorization evaluation, before and after; skipped without `sequences`."""
    mesh: Execution[str] = ""
    """Device mesh of stages without their own, for instance `data=4,model=2`."""
    preset: Execution[Preset | None] = None
    """Sharding of parameters in all stages; unset: the stage's own."""
    dtype: DType | None = None
    """Type for all stages; unset: the stage's own."""


@dataclass(frozen=True)
class PlanConfig(RunConfig):
    """Predict memory, time and chip-hours of stages on TPU slices or GPUs."""

    model: Required[Input[str]] = ""
    """Model, or the name of a Pythia (`pythia-14m` to `pythia-12b`), which is not downloaded."""
    out: OutputFile[str] = ""
    """JSON file to write; unset: only print the table."""
    topology: Required[tuple[str, ...]] = ()
    """TPU slices (`v5e:4x4`, `v4:2x2x4`, `v5p:2x2x2`, `v6e:4x4`) or GPUs (`h100:8`, `h100:4x8` for 4 hosts of 8)."""
    stage: Required[tuple[Literal["sample", "train", "score"], ...]] = ("sample", "train", "score")
    """Stages to plan."""
    compile: bool = True
    """Compile for TPU slices (with libtpu, without a TPU), or estimate by formula, as for GPUs."""
    search: bool = False
    """Search mesh shapes and batch sizes, and rank those that fit."""
    score_tokens: int | None = None
    """Tokens to score, for the chip-hours of `score`."""


@dataclass(frozen=True)
class ModelConfig:
    """Model of a study, and what it shares with other models."""

    name: str = ""
    """Name in the study."""
    model: Input[str] = ""
    """Model, as in other commands."""
    revisions: tuple[str, ...] = ()
    """Revisions on the Hugging Face hub (branches, tags, commits): each is a model NAME@REVISION of the study."""
    stop_ids: tuple[int, ...] | None = None
    """Token ids that end its samples; the first one ends each training document. Unset: the tokenizer's."""
    start_id: int | None = None
    """First token of its samples; unset: BOS of the tokenizer, else of the config, else EOS."""
    start_text: str | None = None
    """Text that precedes its samples, instead of `start_id`."""
    temperature: Positive[float | None] = None
    """Sampling temperature of its text, unless an arm has its own; unset: the study's."""
    learning_rate: float | None = None
    """Peak learning rate of its training, unless an arm has its own; unset: the study's."""
    mesh: Execution[str] = ""
    """Device mesh of its stages; unset: the stage's or the study's."""
    dtype: DType | None = None
    """Type of its parameters and matrix products; unset: the study's."""
    lineage: str = ""
    """Models of one lineage were pre-trained alike (`contrasts`); unset: its name."""
    family: str = ""
    """Models of different families have different architectures and tokenizers, as Llama and Qwen; unset: unknown."""
    score: bool = True
    """Score the base on the study's tasks and texts; a student always is."""
    damage_text: str = ""
    """Text of `score.texts` like its pre-training data, whose bits per byte measure damage; unset: the only text."""
    data: Execution[str] = ""
    """Pre-training data, for the design table, as are the following options."""
    data_order: Execution[str] = ""
    """Order of the pre-training data."""
    initialization: Execution[str] = ""
    """Seed of the initial weights."""
    tokenizer: Execution[str] = ""
    """Tokenizer."""
    architecture: Execution[str] = ""
    """Architecture."""
    size: Execution[str] = ""
    """Size."""


_T = TypeVar("_T")
_Options = TypeVar("_Options", SampleConfig, TrainConfig, ScoreConfig, ExtractConfig)
_OWN_TEXT = ("self", "shuffled", "decontaminated", "size_matched", "generations")
_Sampling = Annotated[_T, AppliesTo((*_OWN_TEXT, "mixture"))]
_Training = Annotated[_T, AppliesTo((*_OWN_TEXT, "text", "mixture"))]
_Generations = Annotated[_T, AppliesTo(("generations",))]


@dataclass(frozen=True)
class ArmConfig:
    """Treatment of students in addition to the matrix.

    Unset options have the study's value.
    """

    name: str = ""
    """Name in the report."""
    kind: Literal[
        "self", "text", "mixture", "shuffled", "decontaminated", "size_matched", "noise", "extrapolate", "generations"
    ] = "self"
    """`self`: own text. `text`: real text. `mixture`: both. `shuffled`: own text with shuffled tokens.
    `decontaminated`: own text without the samples that overlap with the held-out half of the extraction set;
    `size_matched`: without as many others. `noise`: weight noise of the size of the change.
    `extrapolate`: base + weight · (self-trained − base). `generations`: repeated self-training."""
    students: tuple[str, ...] = ()
    """Students with this arm; unset: all."""
    text: Input[str] = ""
    """For `text` and `mixture`: source of `jax-selftrain import`."""
    share: Annotated[float | None, AppliesTo(("mixture",))] = None
    """For `mixture`: share of the rows with real text."""
    weight: Annotated[float | None, AppliesTo(("extrapolate", "noise"))] = None
    """For `extrapolate`: weight of the student. For `noise`: size relative to the change of training; unset: 1."""
    match_damage: Annotated[bool, AppliesTo(("noise",))] = False
    """For `noise`: search the weight whose damage on the `damage_text` is that of self-training, for each seed."""
    generations: _Generations[AtLeastOne[int]] = 2
    """For `generations`: their number; the treatments are `NAME, generation 1` and so on, and NAME for the last."""
    replay: _Generations[Literal["replace", "accumulate", "fresh"]] = "replace"
    """For `generations`: train the base on the latest corpus or on all corpora, or the latest model on a new one
    (`fresh`)."""
    keep_source_tokens: _Sampling[bool] = False
    """Keep the sampled tokens instead of retokenizing the text."""
    start_id: _Sampling[int | None] = None
    """First token of its samples, instead of the source's."""
    start_text: _Sampling[str | None] = None
    """Text that precedes its samples, instead of the source's."""
    temperature: _Sampling[float | None] = None
    """Sampling temperature."""
    top_k: _Sampling[int | None] = None
    """Keep the k most probable tokens."""
    top_p: _Sampling[float | None] = None
    """Keep the smallest set of tokens with a total probability of at least p."""
    min_p: _Sampling[float | None] = None
    """Drop tokens whose probability is below this fraction of the largest one."""
    learning_rate: _Training[float | None] = None
    """Peak learning rate."""
    epochs: Annotated[AtLeastOne[int | None], AppliesTo((*_OWN_TEXT, "text"))] = None
    """Passes over the corpus."""
    packing: _Training[Packing | None] = None
    """Packing of documents into rows."""
    goldfish_k: _Training[AtLeastTwo[int | None]] = None
    """Drop one of k targets by a hash of the tokens before it (goldfish loss): a control that must forget."""
    random_loss_sign: _Training[bool] = False
    """Multiply the loss of each document by +1 or −1 at random."""


@dataclass(frozen=True)
class ClaimConfig:
    """Claim that is declared before the first run."""

    name: str = ""
    """Name in the report."""
    treatment: str = ""
    """`source NAME`, the name of an arm, or a difference of relations of source and student: `self - same lineage`,
    `same lineage - stronger other`, `same lineage - cross family`, `self - other`, `self - cross family`."""
    student: str = ""
    """Student of the claim; unset, for a difference of relations: all students."""
    bases: tuple[str, ...] = ()
    """Students that differ in the seed of pretraining, instead of `student`: the claim is about bases like these, and
    its interval counts them, not seeds. The treatment `own text` is the text of each base."""
    comparator: str = ""
    """Treatment whose change is subtracted; unset: the base."""
    measure: str = "accuracy"
    """`accuracy` (chance-normalized, of eligible tasks), `task/NAME`, `log_odds` or `log_odds/NAME` (of the answer),
    `text/NAME` (bits per byte), `exact_match`, `log_pz` or `pz`, of all sequences or of a class, group or format
    (`exact_match/held_out`, `exact_match/reproduced_held_out`, `exact_match/H_emitted`, `log_pz/format NAME`,
    `log_pz/after_relearning 50`, `exact_match/after_relearning_H 50`: with the number of steps)."""
    direction: Literal["raises", "lowers", "preserves"] = "raises"
    """Claimed change of the measure."""
    margin: Positive[float | None] = None
    """For `preserves`: non-inferiority margin in the unit of the measure (0.01: one point of accuracy)."""
    at_least: Positive[float | None] = None
    """For `raises` and `lowers`: least change, in the unit of the measure; unset: any. The measure
    `exact_match/reproduced_held_out` is 1 before training, so that 0.95 is a fall by at least 95 %."""
    requires: tuple[str, ...] = ()
    """Names of claims that must be supported too: this claim is then that all of them hold."""
    primary: bool = True
    """Confirmatory claim (Holm's correction; at most three), or exploratory."""


@dataclass(frozen=True)
class PromptFormat:
    """Prompt format; unset options are as in `extract`."""

    name: str = ""
    """Name in the report."""
    prefix: int | None = None
    """Prefix length in tokens."""
    suffix: int | None = None
    """Suffix length in tokens."""
    offset: int | None = None
    """Tokens to skip at the start of each sequence."""
    random_offset: bool | None = None
    """Skip a further number of tokens, drawn for each sequence."""
    start_token: Literal["none", "bos"] | None = None
    """Token before the prefix: none, or BOS."""


@dataclass(frozen=True)
class MemorizationConfig:
    """Measurements that separate forgetting from damage and from a change of format."""

    formats: tuple[PromptFormat, ...] = ()
    """Further prompt formats: a loss in one format only is not forgetting."""
    unseen_text: Input[str] = ""
    """File with `text`, or `org/name:SPLIT` of the hub, outside all training data; the base's greedy
    continuations of it are control sequences."""
    max_continuations: AtLeastOne[int] = 1000
    """Maximum number of continuations."""
    relearn_corpus: Input[str] = ""
    """Unrelated source of `jax-selftrain import`, for a short training before a second measurement."""
    relearn_steps: OneOrMore[AtLeastOne[tuple[int, ...]]] = (50,)
    """Steps of the short training; with several numbers, as `[1, 3, 10, 50]`, one training of each length at a constant
    learning rate without warmup, so that a shorter one is the beginning of a longer one."""
    relearn_sequences: bool = False
    """Also train shortly on one half of H, the held-out half of the sequences, and measure the other half."""
    aa_repeat: bool = True
    """Measure each base again with another batch size and dtype, for the A/A floor."""


@dataclass(frozen=True)
class PairConfig:
    """Cell of the matrix: a student and the source of its text."""

    student: str = ""
    """Name of the student."""
    source: str = ""
    """Name of the source."""


@dataclass(frozen=True)
class StudyConfig:
    """Run a study: sources, students, control arms, seeds and a report."""

    out: Required[OutputFolder[str]] = ""
    """Study folder; the same command resumes it, and several processes can share it."""
    title: Execution[str] = ""
    """Title of the report."""
    models: Required[tuple[ModelConfig, ...]] = ()
    """Models."""
    students: tuple[str, ...] = ()
    """Models to train; unset: all."""
    sources: tuple[str, ...] = ()
    """Models to sample from; unset: the students."""
    pairs: tuple[PairConfig, ...] = ()
    """Cells of the matrix; unset: each student with each source."""
    arms: tuple[ArmConfig, ...] = ()
    """Treatments in addition to the matrix."""
    claims: tuple[ClaimConfig, ...] = ()
    """Claims, frozen at the first run."""
    positive_controls: tuple[str, ...] = ()
    """Arms that must raise a capability before its claims are judged (real text)."""
    negative_controls: tuple[str, ...] = ()
    """Arms that must lower it (shuffled text)."""
    seeds: Required[tuple[int, ...]] = (0,)
    """Seeds, each with its own corpora and order; 0 to 9 for pilots, 100 and above for reported results."""
    keep_source_tokens: bool = False
    """Train on the sampled tokens where source and student have the same tokenizer, instead of retokenized text."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """Sampling of the corpora."""
    sample_seed: NonNegative[int | None] = None
    """Seed of the samples of all seeds, which then differ in their subset and order only; unset: each seed samples."""
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    """Removal of benchmark overlap from the samples; skipped without `tasks` and `texts`."""
    subset: SubsetConfig = field(default_factory=SubsetConfig)
    """Subset of the samples that each seed trains on; skipped without `tokens` and `bytes`."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(max_epochs=1.0))
    """Training of all cells; `steps` or `epochs` is required."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    """Capability evaluation of each model."""
    extract: ExtractConfig = field(default_factory=lambda: ExtractConfig(greedy_decode=False))
    """Memorization evaluation of each model; skipped without `sequences`."""
    memorization: MemorizationConfig = field(default_factory=MemorizationConfig)
    """Further memorization measurements; requires `extract.sequences`."""
    proxy_sample_size: int = 256
    """Documents of each corpus for proxies, if there are several sources; 0: none."""
    proxy_steps: NonNegative[int] = 0
    """Steps of a short training on each corpus, for the proxy `probe_gain`; 0: none."""
    embedding_model: Input[str] = ""
    """Embedding model (such as Qwen3-Embedding) for the similarity of corpora and tasks; unset: TF-IDF only."""
    mesh: Execution[str] = ""
    """Device mesh of stages without their own, for instance `data=4,model=2`."""
    preset: Execution[Preset | None] = None
    """Sharding of parameters in all stages; unset: the stage's own."""
    dtype: DType | None = None
    """Type for all stages; unset: the stage's own."""
    split: Literal["all", "dev", "test"] = "all"
    """Items of tasks and texts that the results compare: all, or the dev (30 %) or test split by hash of their content;
    the recipe may be tuned on dev items alone."""
    keep_models: Execution[KeepModels] = "all"
    """Weights to keep: `all`, `last` (trained models, without checkpoints), or `none` (models until every stage that
    reads them is done; a later stage trains them again)."""
    dry_run: Execution[bool] = False
    """Print the stages and their cost without running them."""


@dataclass(frozen=True)
class ReportConfig:
    """Write `report.html` from the results in a folder."""

    folder: Required[OutputFolder[str]] = ""
    """Folder of `run` or `study`."""


@dataclass(frozen=True)
class DemoConfig:
    """Run a small experiment on a CPU in minutes, without downloads."""

    out: Required[OutputFolder[str]] = "selftrain-demo"
    """Output folder."""
    seed: int = 0
    """Random seed."""
    study: bool = False
    """Run the crossover study of six models; takes much longer."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the study."""
    temperatures: tuple[float, ...] = ()
    """Further temperatures of the six sources of the study, to relate proxies to the gain over many sources; without
    arms and claims."""


def fill_options(
    config: RunConfig | StudyConfig, options: _Options, model: str, own: ModelConfig | None = None, **changes: Any
) -> _Options:
    """Fill in the model, mesh, preset and dtype of a stage."""
    own = own or ModelConfig()
    common: dict[str, Any] = {
        "mesh": own.mesh or options.mesh or config.mesh,
        "preset": config.preset or options.preset,
        "dtype": own.dtype or config.dtype or options.dtype,
    }
    if own.learning_rate is not None and isinstance(options, TrainConfig):
        common["learning_rate"] = own.learning_rate
    return replace(options, model=model, **common | changes)
