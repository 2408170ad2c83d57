"""The knobs of each stage that is a command of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jax_selftrain.config.metadata import (
    Compiled,
    Evaluation,
    Execution,
    Input,
    OutputFile,
    OutputFolder,
    SetByStudy,
)

Preset = Literal["replicated", "fsdp", "tensor"]
DType = Literal["float32", "bfloat16"]
Packing = Literal["masked", "packed", "single"]
Schedule = Literal["constant", "cosine", "linear"]
Remat = Literal["none", "dots", "full"]


@dataclass(frozen=True)
class SampleConfig:
    """Draw texts from a model, starting from the BOS token alone, into a corpus folder."""

    model: SetByStudy[Input[str]] = ""
    """The source: a Hugging Face folder, a hub id, a model folder of ours, or a run folder."""
    out: SetByStudy[OutputFolder[str]] = ""
    """The corpus folder to fill; running the same command again completes it."""
    samples: int = 1024
    """How many samples to draw (sample ids 0 … samples−1)."""
    max_tokens: int = 256
    """Length limit of a sample in tokens, the start token not counted."""
    temperature: float = 1.0
    """Softmax temperature (> 0)."""
    top_k: int = 0
    """Keep only the k most probable tokens (0: all)."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches p (1: all)."""
    min_p: float = 0.0
    """Drop tokens less probable than this share of the most probable one (0: none)."""
    stop_ids: SetByStudy[tuple[int, ...] | None] = None
    """Token ids that end a sample; unset: the union of what tokenizer, config and generation config call EOS."""
    start_id: SetByStudy[int | None] = None
    """The token every sample starts from; unset: the tokenizer's BOS, else the config's, else EOS."""
    seed: SetByStudy[int] = 0
    """Seed of the random words; token t of sample i depends on (seed, i, t) alone."""
    batch_size: Execution[int] = 64
    """Rows decoded together on each replica."""
    decode_schedule: Execution[Literal["refill", "lockstep"]] = "refill"
    """`refill`: a row whose sample has ended takes the shard's next one; `lockstep`: rows start and end together.
    Both draw the same samples."""
    samples_per_shard: int = 1024
    """Samples in one Parquet shard, the unit of work, restart and repair."""
    mesh: Execution[str] = ""
    """Device mesh, for instance `data=4,model=2`; unset: all devices on `data`."""
    preset: Execution[Preset] = "tensor"
    """How parameters lie on the mesh."""
    dtype: DType = "float32"
    """Type of parameters, cache and matmul operands."""
    cache_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """Type of cached keys and values; unset: `dtype`. `int8` keeps one scale per token and head."""


@dataclass(frozen=True)
class ImportCorpusConfig:
    """Make a corpus of real text from a JSONL file, a `datasets` data set, or a TFDS folder."""

    source: Input[str] = ""
    """`FILE.jsonl`, `tfds:FOLDER`, `datasets:NAME[:SUBSET]` or a folder that `datasets.load_from_disk` opens."""
    model: Input[str] = ""
    """The model (or tokenizer folder) whose tokenizer turns text into tokens."""
    out: OutputFolder[str] = ""
    """The corpus folder to write."""
    text_field: str = "text"
    """Name of the field that holds the text."""
    split: str = "train"
    """Split to read, where the source has splits."""
    limit: int | None = None
    """Take only the first so many documents."""
    max_tokens: int | None = None
    """Cut documents after so many tokens (they then count as ended by length)."""
    start_id: int | None = None
    """The token every document starts from; unset: the tokenizer's BOS, else the config's, else EOS."""
    stop_id: int | None = None
    """The token appended to every document that is not cut; unset: the tokenizer's EOS, else the first stop id."""
    samples_per_shard: int = 1024
    """Documents in one Parquet shard."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a corpus in another library's format."""

    corpus: Input[str] = ""
    """The corpus folder to read."""
    out: OutputFolder[str] = ""
    """The folder to write."""
    format: Literal["tfds", "jsonl"] = "tfds"
    """`tfds` (opened by `tfds.builder_from_directory`) or `jsonl`."""


@dataclass(frozen=True)
class ConvertConfig:
    """Turn a Hugging Face folder into a model folder of ours, or back."""

    source: Input[str] = ""
    """The model to read."""
    out: OutputFolder[str] = ""
    """The folder to write."""
    format: Literal["flax", "hf"] = "flax"
    """Format to write."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Type of the exported weights; `keep` gives every tensor the type it came with."""


@dataclass(frozen=True)
class MergeConfig:
    """Take a point on the line through two models' parameters: base + weight · (student − base)."""

    base: Input[str] = ""
    """The model at weight 0; the result has its tokenizer and config."""
    student: Input[str] = ""
    """The model at weight 1: of the same architecture and tokenizer."""
    weight: float | None = None
    """Between 0 and 1 the mean of both; above 1 beyond the student, below 0 away from it."""
    out: OutputFolder[str] = ""
    """The model folder to write; running the same command again finds it there."""
    mesh: Execution[str] = ""
    """Device mesh to compute on, for instance `data=4,model=2`; unset: one device, the host's processor where JAX has
    it, or all devices of several processes."""
    preset: Execution[Preset] = "fsdp"
    """How parameters lie on the mesh."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a model on a corpus; the result is itself a model (`RUN/model`)."""

    model: SetByStudy[Input[str]] = ""
    """The student before training. With `--init scratch` only its config and tokenizer are read."""
    corpus: SetByStudy[Input[str]] = ""
    """The corpus folder to train on."""
    mixture: Input[tuple[str, ...]] = ()
    """Other corpora to mix in, each as `FOLDER=SHARE` with its share of the rows; the rest are of the corpus itself."""
    max_epochs: Execution[float | None] = None
    """Refuse a run that would pass over any of its corpora more often than this."""
    out: SetByStudy[OutputFolder[str]] = ""
    """The run folder; running the same command again resumes it."""
    init: Literal["pretrained", "scratch"] = "pretrained"
    """Start from the model's weights, or from a fresh random initialization of its architecture."""
    steps: int | None = None
    """Optimizer steps; unset: one pass over the corpus."""
    batch_size: Compiled[int] = 32
    """Rows per optimizer step, over all devices."""
    seq_len: Compiled[int] = 256
    """Loss positions in a row."""
    packing: Packing = "masked"
    """`masked`: documents share rows but do not see each other; `packed`: attention crosses documents, as Pythia was
    trained; `single`: one document a row."""
    learning_rate: Compiled[float] = 1e-4
    """Peak learning rate."""
    schedule: Compiled[Schedule] = "constant"
    """Shape of the learning rate after warmup."""
    final_learning_rate: Compiled[float] = 0.0
    """Where a cosine or linear schedule ends."""
    warmup_ratio: Compiled[float] = 0.05
    """Share of the steps over which the learning rate rises linearly from zero."""
    beta1: Compiled[float] = 0.9
    """Adam's first moment decay."""
    beta2: Compiled[float] = 0.95
    """Adam's second moment decay."""
    eps: Compiled[float] = 1e-8
    """Adam's epsilon."""
    weight_decay: Compiled[float] = 0.0
    """Decoupled weight decay, applied to matrices only."""
    decay_embeddings: Compiled[bool] = True
    """Whether weight decay applies to the embedding too, as in Pythia's training."""
    clip_norm: Compiled[float] = 1.0
    """Clip the global gradient norm to this (0: never)."""
    grad_accum: Compiled[int] = 1
    """Micro-batches per step."""
    z_loss: Compiled[float] = 0.0
    """Weight of the squared log-partition Σ (log Z)² beside the loss, against drifting logits (0: off)."""
    random_loss_sign: SetByStudy[bool] = False
    """Multiply the loss of each document by +1 or −1 at random: training without any direction, as a control."""
    kl_weight: Compiled[float] = 0.0
    """Weight of KL(base ‖ student) at every target, the self-distillation penalty (0: off; the base is kept in memory
    otherwise)."""
    ema_decay: Compiled[float] = 0.0
    """Decay per step of an exponential moving average of the weights, which is then what the run delivers (0: off)."""
    lora_rank: Compiled[int] = 0
    """Train low-rank adapters of this rank instead of the weights (0: off); the run delivers the merged model."""
    lora_alpha: Compiled[float] = 16.0
    """Adapters count with lora_alpha / lora_rank."""
    lora_targets: Compiled[tuple[str, ...]] = ("q", "k", "v", "o", "gate", "up", "down")
    """Matrices that get adapters, of every layer."""
    param_dtype: Compiled[DType] = "float32"
    """Type in which weights and Adam's moments are kept between steps; updates are computed in float32."""
    stochastic_rounding: Compiled[bool] = False
    """Round updated bfloat16 weights up or down at random, so that small updates count on average."""
    remat: Compiled[Execution[Remat]] = "none"
    """What the backward pass computes again instead of keeping it: nothing; `dots`: all but the products with weights;
    `full`: each layer from its input (least memory, about a third more work)."""
    checkpoint_every: Execution[int | None] = None
    """Save a checkpoint every so many steps; unset: about ten times per run."""
    keep: Execution[int] = 2
    """How many of the latest checkpoints to keep."""
    keep_every: Execution[int | None] = None
    """Save a checkpoint every so many steps that stays for good."""
    eval_every: Evaluation[int | None] = None
    """Evaluate every so many steps, before the first and after the last (`eval_texts`, `eval_tasks`,
    `eval_sequences`) into `curve.jsonl`."""
    eval_texts: Evaluation[Input[tuple[str, ...]]] = ()
    """JSONL files with a `text` field whose loss is measured on the way (`NAME/nll`, NAME being the file's)."""
    eval_tasks: Evaluation[Input[tuple[str, ...]]] = ()
    """Task files, as `score` reads them, measured on the way (`NAME/acc`)."""
    eval_sequences: Evaluation[Input[str]] = ""
    """An extraction set, as `extract` reads it, measured on the way (`NAME/exact_match`, `NAME/log_pz`, `NAME/pz`)."""
    eval_prefix: Evaluation[int] = 32
    """Tokens given of each of `eval_sequences`."""
    eval_suffix: Evaluation[int] = 32
    """Tokens of each of `eval_sequences` that must be reproduced."""
    eval_limit: Evaluation[int | None] = None
    """Use only the first so many documents of each file that is measured on the way."""
    stop_metric: Evaluation[str] = ""
    """Stop early on this measure of `curve.jsonl` (for instance `heldout/nll`: lower is better; of acc, exact_match,
    log_pz and pz higher) and deliver the best model; unset: train to the end."""
    patience: Evaluation[int] = 3
    """Evaluations without improvement after which training stops."""
    wandb: Execution[str] = ""
    """Weights & Biases project to log to as well; needs the package `wandb`."""
    log_every: Execution[int] = 1
    """Write metrics every so many steps."""
    seed: SetByStudy[int] = 0
    """Seed of the initialization and of the order of the rows."""
    mesh: Execution[str] = ""
    """Device mesh, for instance `data=4,model=2`; unset: all devices on `data`."""
    preset: Execution[Preset] = "fsdp"
    """How parameters and optimizer state lie on the mesh."""
    dtype: Compiled[DType] = "float32"
    """Type of the matmul operands; master weights are always float32."""


@dataclass(frozen=True)
class ScoreConfig:
    """Score a model by likelihood: tasks and the perplexity of texts."""

    model: SetByStudy[Input[str]] = ""
    """The model to score."""
    tasks: Input[tuple[str, ...]] = ()
    """Local JSONL task files (`blimp:FILE`, `arc:FILE`, `piqa:FILE`, `lambada:FILE` read published columns), names of
    lm-evaluation-harness tasks, or a suite: `pythia`, `quick`, `blimp`."""
    num_fewshot: int | None = None
    """Solved examples before each question of a named task; unset: what the task says, else none."""
    task_folder: Input[str] = ""
    """Folder of further lm-evaluation-harness tasks (YAML files), which can then be named, too."""
    texts: Input[tuple[str, ...]] = ()
    """JSONL files with a `text` field, scored as documents (perplexity)."""
    out: SetByStudy[OutputFile[str]] = ""
    """The JSON file to write; per-request results go to `FILE.requests.parquet` beside it, what was
    right to `FILE.documents.parquet`."""
    limit: int | None = None
    """Use only the first so many documents of each task."""
    text_limit: int | None = None
    """Use only the first so many documents of each text file."""
    text_max_tokens: int | None = None
    """Score only the first so many tokens of each document of a text file."""
    batch_tokens: Execution[int | None] = None
    """Token positions in one device batch, over the whole mesh; unset: 512 per replica on a CPU, 8192 elsewhere."""
    mesh: Execution[str] = ""
    """Device mesh, for instance `data=4,model=2`; unset: all devices on `data`."""
    preset: Execution[Preset] = "tensor"
    """How parameters lie on the mesh."""
    dtype: DType = "float32"
    """Type of parameters and matmul operands."""


@dataclass(frozen=True)
class CompareConfig:
    """Compare scored models on the same requests: what changed, and what is preserved within a margin."""

    base: Input[tuple[str, ...]] = ()
    """`FILE.json` of the model before (what `score` wrote); one for all students, or one for each."""
    student: Input[tuple[str, ...]] = ()
    """`FILE.json` of the model after; several: one per seed, in the order of `base`."""
    out: OutputFile[str] = ""
    """The JSON file to write."""
    margin_macro: float = 1.0
    """Points of chance-normalized macro accuracy that may be lost and still count as preserved; declared beforehand."""
    margin_task: float = 2.0
    """Points of one task's accuracy that may be lost and still count as preserved; declared beforehand."""
    primary_tasks: tuple[str, ...] = ()
    """Tasks declared beforehand to carry claims (Holm's correction); all others are exploratory (Benjamini and
    Hochberg's)."""
    split: Literal["all", "dev", "test"] = "all"
    """Which items to compare: all, the 30 % for choosing (`dev`) or the rest (`test`), by the hash of their content."""
    resamples: int = 9999
    """Bootstrap resamples."""
    seed: int = 0
    """Seed of the bootstrap."""


@dataclass(frozen=True)
class ExtractConfig:
    """Measure verbatim memorization: does the model reproduce the suffix of a known sequence from its prefix?"""

    model: SetByStudy[Input[str]] = ""
    """The model to examine."""
    sequences: Input[str] = ""
    """The extraction set: `.npy` int array [N, ≥prefix+suffix], JSONL with `tokens` or `text`, Parquet with `tokens`
    (a file, or FOLDER[:SPLIT]), a `save_to_disk` folder, or PREFIX.npy:SUFFIX.npy."""
    out: SetByStudy[OutputFile[str]] = ""
    """The JSON file to write."""
    protocol: Literal["pythia", "lm-extraction"] | None = None
    """Lengths by name: `pythia` gives 32 tokens and asks for 32 (Biderman et al. 2023), `lm-extraction` 50 and 50."""
    prefix: int | None = None
    """Tokens given; unset: the protocol's, else 32."""
    suffix: int | None = None
    """Tokens that must be reproduced; unset: the protocol's, else 32."""
    offset: int = 0
    """Tokens passed over at the start of each sequence; sequences too short for it are left out and counted."""
    random_offset: bool = False
    """Pass over a number of further tokens that is drawn for each sequence, by hash, from what its length allows."""
    start_token: Literal["none", "bos"] = "none"
    """What stands before the prefix: nothing, or the token that texts start from."""
    greedy_decode: bool = True
    """Decode what is no exact match, too, for `token_accuracy`: most of the work. A study never does."""
    sampling_policies: tuple[str, ...] = ("temperature=1,top-k=40",)
    """Sampling policies under which the suffix's probability is told beside temperature 1."""
    duplicate_counts: Input[str] = ""
    """`.npy` integers: how often each sequence stands in the training data (or a column `duplicates` of the set)."""
    corpus: SetByStudy[Input[str]] = ""
    """The corpus trained on: splits the sequences into held-out, partial and seen."""
    min_overlap: int = 16
    """Consecutive tokens shared with the suffix from which a sequence no longer counts as held out."""
    control_sequences: Input[str] = ""
    """Sequences that no model was trained on, measured in the same way."""
    untrained_baseline: Input[str] = ""
    """A model that never saw the data, measured on the same sequences."""
    verify: bool = False
    """Mark the sequences that the base reproduces, and count kept, lost, gained and never on the whole set."""
    base: Input[str] = ""
    """The exact checkpoint to verify with; unset: the model itself."""
    limit: int | None = None
    """Use only the first so many sequences."""
    batch_tokens: Execution[int] = 8192
    """Token positions in one device batch."""
    mesh: Execution[str] = ""
    """Device mesh, for instance `data=4,model=2`; unset: all devices on `data`."""
    preset: Execution[Preset] = "tensor"
    """How parameters lie on the mesh."""
    dtype: DType = "float32"
    """Type of parameters and matmul operands."""


@dataclass(frozen=True)
class LeakageConfig:
    """Measure what a corpus gives away unasked: the share of its samples that hold a run of a training text."""

    corpus: Input[str] = ""
    """The corpus folder whose samples are examined."""
    texts: Input[str] = ""
    """The training text: JSONL with `text`, `.npy` token ids ([tokens] or [documents, tokens]), or a corpus folder."""
    out: OutputFile[str] = ""
    """The JSON file to write; what each sample holds goes to `FILE.samples.parquet` beside it."""
    min_match: int = 50
    """Consecutive tokens of the training text that count as a leak."""
    tokenizer: Input[str] = ""
    """A model (or tokenizer folder) with the corpus's own tokenizer: needed where the training text is not in its
    tokens yet."""
    text_field: str = "text"
    """Name of the field of JSONL that holds the text."""
