"""The knobs of what stages are put together to: a round, a study, their reports, the demo."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeVar

from jax_selftrain.config.commands import DType, ExtractConfig, Packing, SampleConfig, ScoreConfig, TrainConfig
from jax_selftrain.config.metadata import AppliesTo, Execution, Input, OutputFile, OutputFolder


@dataclass(frozen=True)
class RunConfig:
    """One self-training round: sample, train, measure before and after, report."""

    model: Input[str] = ""
    """The base: the model that is trained and, unless `source` is set, the one that is sampled."""
    source: Input[str] = ""
    """The model to sample from; unset: the base itself."""
    out: OutputFolder[str] = ""
    """The folder of the round; running the same command again completes it."""
    title: Execution[str] = ""
    """Headline of the report; unset: made from the model's name."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """How the corpus is drawn (`model` and `out` are the round's)."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How the student is trained (`model`, `corpus` and `out` are the round's)."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    """Capability, before and after (`model` and `out` are the round's)."""
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    """Memorization, before and after (`model`, `corpus` and `out` are the round's); skipped without `sequences`."""
    mesh: Execution[str] = ""
    """Device mesh of every stage that names none itself."""
    dtype: DType | None = None
    """Type for every stage; unset: each stage's own."""


@dataclass(frozen=True)
class PlanConfig(RunConfig):
    """What stages of a round take on a TPU slice or on GPUs: memory, time and chip-hours, known before there is one."""

    model: Input[str] = ""
    """The base, or only the name of a Pythia, `pythia-14m` to `pythia-12b`, of which nothing is then fetched."""
    out: OutputFile[str] = ""
    """A JSON file for the whole plan; unset: only the table is printed."""
    topology: tuple[str, ...] = ()
    """Machines: TPU slices (`v5e:4x4`, `v4:2x2x4`, `v5p:2x2x2`, `v6e:4x4`) or GPUs (`h100:8`, or `h100:4x8` for four
    hosts of eight)."""
    stage: tuple[Literal["sample", "train", "score"], ...] = ("sample", "train", "score")
    """Which stages."""
    compile: bool = True
    """Compile for TPU slices, which needs libtpu and no TPU; false: estimate, as for GPUs."""
    search: bool = False
    """Try shapes of the mesh and batch sizes, and rank those that fit."""
    score_tokens: int | None = None
    """Tokens that are to be scored, for the chip-hours of `score`."""


@dataclass(frozen=True)
class ModelConfig:
    """A model of a study, and what it has in common with others."""

    name: str = ""
    """What it is called in the study."""
    model: Input[str] = ""
    """The model itself, as everywhere."""
    stop_ids: tuple[int, ...] | None = None
    """Token ids that end its texts, the first of which ends every document that it is trained on; unset: the sampler's
    own rule, and the tokenizer's EOS."""
    start_id: int | None = None
    """The token that its texts start from; unset: the sampler's rule."""
    lineage: str = ""
    """Models of one lineage are at home with each other's text; unset: its own name."""
    data: str = ""
    """What it was pre-trained on, for the design table; as are the following."""
    data_order: str = ""
    """Order of that data."""
    initialization: str = ""
    """Seed of its first weights."""
    tokenizer: str = ""
    """Its tokenizer."""
    architecture: str = ""
    """Its architecture."""
    size: str = ""
    """Its size."""


_T = TypeVar("_T")
_Sampling = Annotated[_T, AppliesTo(("self", "shuffled", "decontaminated", "size_matched", "generations"))]
_Training = Annotated[_T, AppliesTo(("self", "text", "shuffled", "decontaminated", "size_matched", "generations"))]
_Generations = Annotated[_T, AppliesTo(("generations",))]


@dataclass(frozen=True)
class ArmConfig:
    """A treatment of each student beside the matrix of sources; what it does not name is as in every cell."""

    name: str = ""
    """What it is called in the report."""
    kind: Literal[
        "self", "text", "shuffled", "decontaminated", "size_matched", "noise", "extrapolate", "generations"
    ] = "self"
    """`self`: the student's own text. `text`: real text. `shuffled`: own text, tokens in random order.
    `decontaminated`: own text without the samples that overlap with the held-out half of the extraction set;
    `size_matched`: without as many others. `noise`: no training, but weight noise as large as its change.
    `extrapolate`: base + weight · (self-trained − base). `generations`: self-training over and over."""
    students: tuple[str, ...] = ()
    """Students that get it; unset: all."""
    text: Input[str] = ""
    """For `text`: what `jax-selftrain import` reads."""
    weight: float | None = None
    """For `extrapolate`: below 0 away from the self-trained model, above 1 beyond it. For `noise`: how many times as
    large as the change of training; unset: 1."""
    generations: _Generations[int] = 2
    """For `generations`: how many."""
    replay: _Generations[Literal["replace", "accumulate", "fresh"]] = "replace"
    """For `generations`: the base is trained on the latest corpus alone, on all corpora so far, or the latest model
    goes on with a new one."""
    keep_source_tokens: _Sampling[bool] = False
    """Keep the sampled tokens, instead of carrying them through text."""
    temperature: _Sampling[float | None] = None
    """Instead of the study's; as are the following."""
    top_k: _Sampling[int | None] = None
    """Keep only the k most probable tokens."""
    top_p: _Sampling[float | None] = None
    """Keep the smallest set of tokens whose probability reaches p."""
    min_p: _Sampling[float | None] = None
    """Drop tokens less probable than this share of the most probable one."""
    learning_rate: _Training[float | None] = None
    """Peak learning rate."""
    packing: _Training[Packing | None] = None
    """How documents share rows."""
    random_loss_sign: _Training[bool] = False
    """Multiply the loss of each document by +1 or −1 at random."""


@dataclass(frozen=True)
class ClaimConfig:
    """A claim that is declared before the first run."""

    name: str = ""
    """What it is called in the report."""
    treatment: str = ""
    """`source NAME`, the name of an arm, or `home - away`: the interaction of the matrix."""
    student: str = ""
    """Whose change it speaks of (`home - away` speaks of all)."""
    comparator: str = ""
    """Another treatment of the student, from whose change the difference is taken; unset: the base."""
    measure: str = "accuracy"
    """`accuracy` (chance-normalized, of the eligible tasks), `task/NAME`, `log_odds` of the right choice (of these, or
    `log_odds/NAME`), `text/NAME` (bits per byte), `exact_match`, `log_pz` or `pz` (its mean), of all sequences or of a
    class, group or view (`exact_match/held_out`, `exact_match/H`, `log_pz/format NAME`, `log_pz/after_relearning`)."""
    direction: Literal["raises", "lowers", "preserves"] = "raises"
    """What is claimed of the measure's change."""
    margin: float | None = None
    """For `preserves`: the loss that still counts as none, in the measure's own unit (0.01: one point of accuracy)."""
    primary: bool = True
    """One of at most three that are tested under Holm's correction; the others are exploratory."""


@dataclass(frozen=True)
class PromptFormat:
    """Another way to ask for the sequences of a study; what it does not name is as in its `extract`."""

    name: str = ""
    """What it is called in the report."""
    prefix: int | None = None
    """Tokens given."""
    suffix: int | None = None
    """Tokens that must be reproduced."""
    offset: int | None = None
    """Tokens passed over at the start of each sequence."""
    random_offset: bool | None = None
    """Pass over a number of further tokens, drawn for each sequence."""
    start_token: Literal["none", "bos"] | None = None
    """What stands before the prefix."""


@dataclass(frozen=True)
class MemorizationConfig:
    """What tells forgetting from damage and from a change of format, beside the extraction itself."""

    formats: tuple[PromptFormat, ...] = ()
    """Other ways to ask: what is lost in one format alone has not been forgotten."""
    unseen_text: Input[str] = ""
    """JSONL with a `text` field that no model was trained on. The base's own greedy continuations of it are a path of
    no memory: how many of them a student leaves, beside sequences that were as probable, is the price of damage."""
    max_continuations: int = 1000
    """Maximum number of continuations."""
    relearn_corpus: Input[str] = ""
    """What `jax-selftrain import` reads: text that has nothing to do with the sequences. Every student, and the base,
    is trained on it for a moment and asked again: what comes back was not forgotten."""
    relearn_steps: int = 50
    """How long that moment is."""
    aa_repeat: bool = True
    """Measure each base again in another batch size and in the other dtype: what flips between is the floor under every
    change."""


@dataclass(frozen=True)
class StudyConfig:
    """Who learns from whom: a matrix of sources and students with control arms, restartable, with a report."""

    out: OutputFolder[str] = ""
    """The folder of the study; running the same command again completes it, and several processes may share it."""
    title: Execution[str] = ""
    """Headline of the report."""
    models: tuple[ModelConfig, ...] = ()
    """The models."""
    students: tuple[str, ...] = ()
    """Models that are trained; unset: all."""
    sources: tuple[str, ...] = ()
    """Models whose text they are trained on; unset: the students."""
    arms: tuple[ArmConfig, ...] = ()
    """Treatments beside the matrix."""
    claims: tuple[ClaimConfig, ...] = ()
    """What is claimed beforehand; frozen at the first run."""
    positive_controls: tuple[str, ...] = ()
    """Arms that must raise a capability before a claim about it is judged: real text."""
    negative_controls: tuple[str, ...] = ()
    """Arms that must lower it: shuffled text."""
    seeds: tuple[int, ...] = (0,)
    """Each draws corpora and an order of its own. 0 to 9 are for pilots, those that are reported begin at 100."""
    keep_source_tokens: bool = False
    """Train on the sampled tokens where source and student have the same tokenizer, instead of retokenized text."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """Sampling of corpora (the study sets `model`, `out` and `seed`)."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(max_epochs=1.0))
    """The recipe of all cells (the study sets `model`, `corpus`, `out` and `seed`; `steps` is required)."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    """Capability of every model (`model` and `out` are the study's)."""
    extract: ExtractConfig = field(default_factory=lambda: ExtractConfig(greedy_decode=False))
    """Memorization of every model (the study sets `model`, `corpus` and `out`); skipped without `sequences`."""
    memorization: MemorizationConfig = field(default_factory=MemorizationConfig)
    """What is asked beside it; only with `extract.sequences`."""
    proxy_sample_size: int = 256
    """Documents of each corpus of the matrix whose likelihood under student and source is taken beforehand, where there
    are several sources (`study.proxies`); 0: none."""
    embedding_model: Input[str] = ""
    """A decoder that was trained to embed texts (Qwen3-Embedding, say): the likeness of each corpus to what the tasks
    ask is taken by its vectors, too; unset: by TF-IDF alone."""
    mesh: Execution[str] = ""
    """Device mesh of every stage that names none itself."""
    dtype: DType | None = None
    """Type for every stage; unset: each stage's own."""
    dry_run: Execution[bool] = False
    """Print what would be done, and do nothing."""


@dataclass(frozen=True)
class ReportConfig:
    """Make `report.html` from what is in a run folder."""

    folder: OutputFolder[str] = ""
    """The folder that `run` filled."""


@dataclass(frozen=True)
class DemoConfig:
    """The whole story on a CPU in minutes, without any download."""

    out: OutputFolder[str] = "selftrain-demo"
    """Folder for everything the demo makes."""
    seed: int = 0
    """Seed of the demo's text, models and samples."""
    study: bool = False
    """Do the crossover study of six models instead of one round; takes much longer."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of that study."""
