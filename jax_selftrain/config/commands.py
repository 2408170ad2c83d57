"""Options of the commands that run one stage."""

from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from jax_selftrain.config.metadata import (
    AtLeastOne,
    AtLeastTwo,
    Compiled,
    Evaluation,
    Execution,
    Input,
    NonNegative,
    OmitDefault,
    OutputFile,
    OutputFolder,
    Positive,
    Probability,
    Range,
    Required,
    SetByStudy,
    TaskNames,
)

T = TypeVar("T")
_Decay = Annotated[T, Range("in [0, 1)", lambda value: 0 <= value < 1)]
_Points = Annotated[T, Range("above 0 and at most 100 points", lambda value: 0 < value <= 100)]

Preset = Literal["replicated", "fsdp", "tensor"]
DType = Literal["float32", "bfloat16"]
Packing = Literal["masked", "packed", "single"]
Schedule = Literal["constant", "cosine", "linear"]
Remat = Literal["none", "dots", "full"]


@dataclass(frozen=True)
class SampleConfig:
    """Sample texts from a model, from the BOS token, into a corpus."""

    model: Required[SetByStudy[Input[str]]] = ""
    """Model to sample from: a Hugging Face folder, a hub id, an Orbax tree of `convert`, or a run folder."""
    out: Required[SetByStudy[OutputFolder[str]]] = ""
    """Corpus folder to write; the same command resumes it."""
    samples: AtLeastOne[int] = 1024
    """Number of samples."""
    max_tokens: AtLeastOne[int] = 256
    """Maximum number of tokens of a sample, without the start tokens."""
    min_tokens: NonNegative[int] = 0
    """Minimum number of tokens of a sample; the probability of stop ids is zero before."""
    temperature: Positive[float] = 1.0
    """Softmax temperature, greater than 0."""
    top_k: NonNegative[int] = 0
    """Keep the k most probable tokens (0: all)."""
    top_p: Annotated[float, Range("above 0 and at most 1", lambda value: 0 < value <= 1)] = 1.0
    """Keep the smallest set of tokens with a total probability of at least p (1: all)."""
    min_p: Probability[float] = 0.0
    """Drop tokens whose probability is below this fraction of the largest one (0: none)."""
    stop_ids: SetByStudy[tuple[int, ...] | None] = None
    """Token ids that end a sample; unset: the EOS ids of the tokenizer, config and generation config."""
    start_id: SetByStudy[int | None] = None
    """First token of each sample; unset: BOS of the tokenizer, else of the config, else EOS."""
    start_text: SetByStudy[str | None] = None
    """Text that precedes each sample, instead of `--start-id`; its special tokens are recognized."""
    add_special_tokens: bool = False
    """Tokenize the start text with the special tokens that the tokenizer adds: a BOS text then gives BOS twice."""
    seed: SetByStudy[Annotated[int, Range("between 0 and 2^64 - 1", lambda value: 0 <= value < 2**64)]] = 0
    """Random seed; token t of sample i depends only on (seed, i, t)."""
    batch_size: Execution[AtLeastOne[int]] = 64
    """Slots of the decode batch on each replica."""
    samples_per_shard: AtLeastOne[int] = 1024
    """Samples in one Parquet shard, the unit of work and of resumption."""
    extend: SetByStudy[Input[str]] = ""
    """Corpus with fewer samples and otherwise the same options, whose full shards are copied instead of drawn."""
    mesh: Execution[str] = ""
    """Device mesh, for instance `data=4,model=2`; unset: all devices on `data`."""
    preset: Execution[Preset] = "tensor"
    """Sharding of parameters."""
    dtype: DType = "float32"
    """Type of parameters, KV cache and matrix products."""
    cache_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """Type of the KV cache; unset: `dtype`. `int8` stores one scale for each token and head."""


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a model between Hugging Face and Orbax."""

    source: Required[Input[str]] = ""
    """Model to read."""
    out: Required[OutputFolder[str]] = ""
    """Folder to write."""
    format: Literal["flax", "hf"] = "flax"
    """`hf`: a Hugging Face folder; `flax`: an Orbax tree of parameters."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Type of the written weights; `keep`: the type of each tensor in the source."""
    ignore_config_keys: tuple[str, ...] = ()
    """Keys of config.json to remove: keys that this package does not know, and that do not change the model."""


@dataclass(frozen=True)
class PushConfig:
    """Upload a model or a corpus to the Hugging Face hub."""

    folder: Required[Input[str]] = ""
    """Model folder, run folder or corpus; the card of a model gets its measured changes."""
    repo: Required[str] = ""
    """Repository, `org/name`; created if it does not exist."""
    revision: str = ""
    """Branch to upload to; created if it does not exist; unset: `main`."""
    private: bool = False
    """Create the repository as a private one."""


@dataclass(frozen=True)
class MergeConfig:
    """Interpolate or extrapolate two models: base + weight · (student − base)."""

    base: Required[Input[str]] = ""
    """Model at weight 0; the result has its tokenizer and config."""
    student: Required[Input[str]] = ""
    """Model at weight 1, with the same architecture and tokenizer."""
    weight: Required[float | None] = None
    """Weight of the student; above 1 and below 0 extrapolate."""
    out: Required[OutputFolder[str]] = ""
    """Model folder to write; the same command keeps a finished one."""
    mesh: Execution[str] = ""
    """Device mesh, for instance `data=4,model=2`; unset: one CPU device, or all devices of several processes."""
    preset: Execution[Preset] = "fsdp"
    """Sharding of parameters."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a model on a corpus; the result is a model (`RUN/model`)."""

    model: Required[SetByStudy[Input[str]]] = ""
    """Model to train; with `--init scratch` only its config and tokenizer are read."""
    corpus: Required[SetByStudy[Input[str]]] = ""
    """Corpus folder to train on."""
    out: Required[SetByStudy[OutputFolder[str]]] = ""
    """Run folder; the same command resumes it."""
    steps: AtLeastOne[int | None] = None
    """Optimizer steps; unset: one epoch."""
    epochs: AtLeastOne[int | None] = None
    """Epochs over the corpus, instead of steps; by default, evaluations and checkpoints are at the end of each."""
    batch_size: Compiled[AtLeastOne[int]] = 32
    """Rows of each optimizer step, over all devices."""
    seq_len: Compiled[AtLeastOne[int]] = 256
    """Loss positions of a row."""
    learning_rate: NonNegative[float] = 1e-4
    """Peak learning rate."""
    seed: SetByStudy[int] = 0
    """Random seed of the initialization and of the order of rows."""
    init: Literal["pretrained", "scratch"] = "pretrained"
    """Start from the weights of the model, or from random weights."""
    packing: Packing = "masked"
    """`masked`: documents share rows without attending to each other; `packed`: with attention; `single`: one each."""
    mixture: Input[tuple[str, ...]] = ()
    """Further corpora, each as `FOLDER=SHARE` of the rows; the remaining rows are from the corpus."""
    max_epochs: Execution[Positive[float | None]] = None
    """Refuse a run that visits any corpus more often than this."""
    schedule: Schedule = "constant"
    """Learning rate schedule after warmup."""
    final_learning_rate: NonNegative[float] = 0.0
    """Final learning rate of a cosine or linear schedule."""
    warmup_ratio: Probability[float] = 0.05
    """Fraction of the steps with linear warmup."""
    beta1: Compiled[_Decay[float]] = 0.9
    """Adam's decay of the first moment."""
    beta2: Compiled[_Decay[float]] = 0.95
    """Adam's decay of the second moment."""
    eps: Compiled[Positive[float]] = 1e-8
    """Adam's epsilon."""
    weight_decay: Compiled[NonNegative[float]] = 0.0
    """Decoupled weight decay of matrices."""
    decay_embeddings: Compiled[bool] = True
    """Apply weight decay to the embedding, as Pythia's training does."""
    clip_norm: Compiled[NonNegative[float]] = 1.0
    """Maximum global gradient norm (0: no clipping)."""
    grad_accum: Compiled[AtLeastOne[int]] = 1
    """Micro-batches of each step."""
    random_loss_sign: SetByStudy[bool] = False
    """Multiply the loss of each document by +1 or −1 at random: a control without direction."""
    goldfish_k: AtLeastTwo[int | None] = None
    """Drop one of k targets from the loss, chosen by a hash of the 13 tokens before it (goldfish loss,
    arXiv:2406.10209): text is learned, but not verbatim. Unset: none."""
    lora_rank: Compiled[NonNegative[int]] = 0
    """Rank of LoRA adapters, trained instead of the weights (0: off); the result is the merged model."""
    lora_alpha: Compiled[NonNegative[float]] = 16.0
    """LoRA scale: adapters are multiplied by lora_alpha / lora_rank."""
    lora_targets: Compiled[tuple[str, ...]] = ("q", "k", "v", "o", "gate", "up", "down")
    """Matrices with adapters, in every layer."""
    mesh: Execution[str] = ""
    """Device mesh, for instance `data=4,model=2`; unset: all devices on `data`."""
    preset: Execution[Preset] = "fsdp"
    """Sharding of parameters and optimizer state."""
    dtype: Compiled[DType] = "float32"
    """Type of matrix products; parameters are float32."""
    remat: Compiled[Execution[Remat]] = "none"
    """Rematerialization: `none`, `dots` (all but products with weights) or `full` (layers; about a third more
    compute)."""
    checkpoint_every: Execution[AtLeastOne[int | None]] = None
    """Steps between checkpoints; unset: each epoch, or about ten checkpoints in a run."""
    keep: Execution[AtLeastOne[int]] = 2
    """Number of latest checkpoints to keep."""
    keep_every: Execution[AtLeastOne[int | None]] = None
    """Steps between checkpoints that are kept permanently."""
    eval_every: Evaluation[AtLeastOne[int | None]] = None
    """Steps between evaluations (`eval_texts`, `eval_tasks`, `eval_sequences`), written to `curve.jsonl`; unset with
    `epochs`: each epoch."""
    eval_texts: Evaluation[Input[tuple[str, ...]]] = ()
    """Files with a `text` field, or data sets of the hub (`org/name:SPLIT`), to measure the loss on (`NAME/nll`, with
    the name of the file)."""
    eval_tasks: Evaluation[Input[tuple[str, ...]]] = ()
    """Task files to measure the accuracy on (`NAME/acc`), as in `score`."""
    eval_sequences: Evaluation[Input[str]] = ""
    """Extraction set to measure (`NAME/exact_match`, `NAME/log_pz`, `NAME/pz`), also by overlap with the training
    corpora (`NAME/exact_match/held_out`), as in `extract`."""
    eval_prefix: Evaluation[AtLeastOne[int]] = 32
    """Prefix tokens of `eval_sequences`."""
    eval_suffix: Evaluation[AtLeastOne[int]] = 32
    """Suffix tokens of `eval_sequences`."""
    eval_min_overlap: OmitDefault[Evaluation[AtLeastOne[int]]] = 16
    """Tokens of the longest match with a suffix from which a sequence of `eval_sequences` is not held-out."""
    eval_limit: Evaluation[AtLeastOne[int | None]] = None
    """Number of items of each evaluation file; unset: all."""
    eval_split: Evaluation[Literal["all", "dev", "test"]] = "all"
    """Items of `eval_texts` and `eval_tasks`: all, or the dev (30 %) or test split by hash of their content."""
    best_epoch: bool = False
    """The result is the epoch with the best accuracy of `eval_tasks` on dev items, instead of the last epoch."""
    wandb: Execution[str] = ""
    """Weights & Biases project to log to; requires `wandb`."""
    log_every: Execution[AtLeastOne[int]] = 1
    """Steps between metrics."""


@dataclass(frozen=True)
class ScoreConfig:
    """Score a model by log-likelihood on tasks and texts."""

    model: Required[SetByStudy[Input[str]]] = ""
    """Model to score."""
    tasks: TaskNames[Input[tuple[str, ...]]] = ()
    """JSONL task files (`blimp:FILE`, `arc:FILE`, `piqa:FILE`, `lambada:FILE`), lm-evaluation-harness tasks, or a
    suite; `NAME@25`, or in YAML `{name: NAME, num_fewshot: 25}`, has 25 few-shot examples."""
    num_fewshot: int | None = None
    """Few-shot examples of lm-evaluation-harness tasks without their own; unset: the task's number, else 0."""
    task_folder: Input[str] = ""
    """Folder with further lm-evaluation-harness tasks (YAML files)."""
    confirm_run_unsafe_code: Execution[bool] = False
    """Run lm-evaluation-harness tasks that execute code which the model writes (HumanEval)."""
    texts: Input[tuple[str, ...]] = ()
    """Files with a `text` field (JSONL, Parquet), or data sets of the hub (`org/name:SPLIT`, `org/name/FOLDER:SPLIT`),
    to measure the perplexity of."""
    out: Required[SetByStudy[OutputFile[str]]] = ""
    """JSON file to write, with `FILE.requests.parquet` and `FILE.items.parquet`."""
    limit: AtLeastOne[int | None] = None
    """Number of items of each task; unset: all."""
    text_limit: AtLeastOne[int | None] = None
    """Number of documents of each text file; unset: all."""
    text_max_tokens: AtLeastOne[int | None] = None
    """Truncate documents of text files to this many tokens."""
    token_records: OmitDefault[bool] = False
    """Also write `FILE.tokens.parquet`: the scores of each token of the texts (not of the tasks)."""
    batch_tokens: Execution[AtLeastOne[int | None]] = None
    """Tokens of one batch, over the mesh; unset: 512 on each replica of CPUs, else 8192."""
    mesh: Execution[str] = ""
    """Device mesh, for instance `data=4,model=2`; unset: all devices on `data`."""
    preset: Execution[Preset] = "tensor"
    """Sharding of parameters."""
    dtype: DType = "float32"
    """Type of parameters and matrix products."""


@dataclass(frozen=True)
class CompareConfig:
    """Compare scored models on the same requests: changes, and non-inferiority within margins."""

    base: Required[Input[tuple[str, ...]]] = ()
    """Score files of the base: one for all students, or one for each."""
    student: Required[Input[tuple[str, ...]]] = ()
    """Score files of the students, one for each seed, in the order of `base`."""
    out: Required[OutputFile[str]] = ""
    """JSON file to write."""
    margin_macro: _Points[float] = 1.0
    """Non-inferiority margin of chance-normalized macro accuracy, in points, declared in advance."""
    margin_task: _Points[float] = 2.0
    """Non-inferiority margin of the accuracy of one task, in points, declared in advance."""
    primary_tasks: tuple[str, ...] = ()
    """Tasks with confirmatory claims (Holm's correction); other tasks are exploratory (Benjamini and Hochberg)."""
    split: Literal["all", "dev", "test"] = "all"
    """Items to compare: all, or the dev (30 %) or test split by hash of their content."""
    resamples: Annotated[int, Range("at least 100", lambda value: value >= 100)] = 9999
    """Bootstrap resamples."""
    seed: NonNegative[int] = 0
    """Seed of the bootstrap."""


@dataclass(frozen=True)
class ExtractConfig:
    """Measure verbatim memorization: the suffix of a sequence from its prefix."""

    model: Required[SetByStudy[Input[str]]] = ""
    """Model to examine."""
    sequences: Required[Input[str]] = ""
    """Extraction set: `.npy` [N, ≥prefix+suffix], JSONL or Parquet (`tokens`, `text`), a `save_to_disk` folder, or
    P.npy:S.npy."""
    out: Required[SetByStudy[OutputFile[str]]] = ""
    """JSON file to write."""
    protocol: Literal["pythia", "lm-extraction"] | None = None
    """Published lengths: `pythia` 32 and 32 tokens (Biderman et al. 2023), `lm-extraction` 50 and 50."""
    prefix: AtLeastOne[int | None] = None
    """Prefix length in tokens; unset: the protocol's, else 32."""
    suffix: AtLeastOne[int | None] = None
    """Suffix length in tokens; unset: the protocol's, else 32."""
    offset: NonNegative[int] = 0
    """Tokens to skip at the start of each sequence; too short sequences are dropped and counted."""
    random_offset: bool = False
    """Skip a further number of tokens, drawn for each sequence by hash."""
    start_token: Literal["none", "bos"] = "none"
    """Token before the prefix: none, or BOS."""
    greedy_decode: bool = True
    """Decode all sequences, for `token_accuracy` and `edit_distance`; most of the compute. A study never decodes."""
    token_records: OmitDefault[bool] = False
    """Also write `FILE.tokens.parquet`: the scores of each suffix token of the sequences and controls."""
    sampling_policies: tuple[str, ...] = ("temperature=1,top-k=40",)
    """Sampling parameters for the probability of the suffix, in addition to temperature 1."""
    duplicate_counts: Input[str] = ""
    """Copies of each sequence in the training data, unless the set has a column `duplicates`: `.npy` integers, or
    Parquet, CSV or JSONL with `index` and `duplicates`, joined by the set's `index`."""
    corpus: SetByStudy[Input[str]] = ""
    """Training corpus: divides the sequences into held-out, partial and seen."""
    mixed_corpora: SetByStudy[Input[tuple[str, ...]]] = ()
    """Further training corpora; the longest match with any corpus decides."""
    min_overlap: AtLeastOne[int] = 16
    """Tokens of the longest match with a suffix from which a sequence is not held-out."""
    control_sequences: Input[str] = ""
    """Sequences outside all training data, measured in the same way."""
    untrained_baseline: Input[str] = ""
    """Model that was not trained on the data, measured on the same sequences."""
    verify: bool = False
    """Count sequences that are kept, lost, gained and never reproduced relative to the base."""
    base: Input[str] = ""
    """Base model of `verify`; unset: the model itself."""
    limit: AtLeastOne[int | None] = None
    """Number of sequences, from the first; unset: all."""
    subsample: OmitDefault[AtLeastOne[int | None]] = None
    """Number of sequences, those with the smallest hashes of their `index`; unset: all."""
    column: OmitDefault[str] = ""
    """Column of tokens or text of `sequences`; unset: `tokens`, `input_ids`, `token_ids` or `text`."""
    batch_tokens: Execution[AtLeastOne[int]] = 8192
    """Tokens of one batch."""
    mesh: Execution[str] = ""
    """Device mesh, for instance `data=4,model=2`; unset: all devices on `data`."""
    preset: Execution[Preset] = "tensor"
    """Sharding of parameters."""
    dtype: DType = "float32"
    """Type of parameters and matrix products."""


@dataclass(frozen=True)
class ExtractWindowsConfig:
    """Measure verbatim memorization in windows over whole documents."""

    model: Required[Input[str]] = ""
    """Model to examine."""
    texts: Required[Input[tuple[str, ...]]] = ()
    """Files with a `text` field, or data sets of the hub (`org/name:SPLIT`): each text is a document."""
    out: Required[OutputFile[str]] = ""
    """JSON file to write, with `FILE.windows.parquet` and the heat map `FILE.windows.svg`."""
    window: AtLeastOne[int] = 50
    """Length of a window in tokens: the suffix."""
    stride: AtLeastOne[int] = 10
    """Tokens from the first token of a window to that of the next."""
    prefix: AtLeastOne[int] = 50
    """Minimum number of tokens before a window that the model reads."""
    max_prefix: AtLeastOne[int | None] = None
    """Maximum number of tokens before a window; unset: the model's positions; equal to `prefix`: fixed prefixes."""
    start_token: Literal["none", "bos"] = "none"
    """Token before the prefix: none, or BOS."""
    base: Input[str] = ""
    """Model to compare with, measured on the same windows."""
    limit: AtLeastOne[int | None] = None
    """Number of documents of each text file; unset: all."""
    batch_tokens: Execution[AtLeastOne[int | None]] = None
    """Tokens of one batch, over the mesh; unset: 512 on each replica of CPUs, else 8192."""
    mesh: Execution[str] = ""
    """Device mesh, for instance `data=4,model=2`; unset: all devices on `data`."""
    preset: Execution[Preset] = "tensor"
    """Sharding of parameters."""
    dtype: DType = "float32"
    """Type of parameters and matrix products."""
