"""Options of the commands that read and write corpora."""

from dataclasses import dataclass
from typing import Literal

from jax_selftrain.config.metadata import (
    AtLeastOne,
    Input,
    NonNegative,
    OutputFile,
    OutputFolder,
    Required,
    SetByStudy,
    TaskNames,
)


@dataclass(frozen=True)
class ImportCorpusConfig:
    """Import real text from JSONL, `datasets` or TFDS as a corpus."""

    source: Required[Input[str]] = ""
    """`FILE.jsonl`, `org/name:SPLIT` of the Hugging Face hub, `tfds:FOLDER`, `datasets:NAME[:SUBSET]`, or a folder for
    `datasets.load_from_disk`."""
    model: Required[Input[str]] = ""
    """Model or tokenizer folder whose tokenizer is used."""
    out: Required[OutputFolder[str]] = ""
    """Corpus folder to write."""
    text_field: str = "text"
    """Field with the text."""
    split: str = "train"
    """Split to read, if the source has splits."""
    limit: AtLeastOne[int | None] = None
    """Number of documents to read; unset: all."""
    max_tokens: AtLeastOne[int | None] = None
    """Truncate documents to this many tokens (finish reason `length`)."""
    start_id: int | None = None
    """First token of each document; unset: BOS of the tokenizer, else of the config, else EOS."""
    stop_id: int | None = None
    """Token appended to each document that is not truncated; unset: EOS of the tokenizer, else the first stop id."""
    samples_per_shard: AtLeastOne[int] = 1024
    """Documents in one Parquet shard."""


@dataclass(frozen=True)
class ExportConfig:
    """Export a corpus to the format of another library."""

    corpus: Required[Input[str]] = ""
    """Corpus folder to read."""
    out: Required[OutputFolder[str]] = ""
    """Folder to write."""
    format: Literal["tfds", "jsonl"] = "tfds"
    """`tfds` (for `tfds.builder_from_directory`) or `jsonl`."""


@dataclass(frozen=True)
class SubsetConfig:
    """Draw random documents of a corpus, up to a size."""

    corpus: Required[SetByStudy[Input[str]]] = ""
    """Corpus folder to read."""
    out: Required[SetByStudy[OutputFolder[str]]] = ""
    """Corpus folder to write."""
    tokens: AtLeastOne[int | None] = None
    """Number of tokens at which drawing ends."""
    bytes: AtLeastOne[int | None] = None
    """Number of bytes of text (UTF-8) at which drawing ends, instead of tokens: equal for all tokenizers."""
    draw: Literal["bootstrap", "without-replacement"] = "bootstrap"
    """`bootstrap`: uniformly with replacement; `without-replacement`: each document at most once."""
    subset: SetByStudy[NonNegative[int]] = 0
    """Number of the subset; subsets of one seed are independent."""
    seed: SetByStudy[NonNegative[int]] = 0
    """Random seed."""


@dataclass(frozen=True)
class DecontaminateConfig:
    """Remove the samples of a corpus that share word n-grams with benchmarks."""

    corpus: Required[SetByStudy[Input[str]]] = ""
    """Corpus folder to read."""
    out: Required[SetByStudy[OutputFolder[str]]] = ""
    """Corpus folder to write, with `decontamination.json`."""
    tasks: TaskNames[Input[tuple[str, ...]]] = ()
    """Benchmarks: tasks of lm-evaluation-harness (all splits), or task files as for `score`."""
    texts: Input[tuple[str, ...]] = ()
    """Files with `text`, or data sets of the hub, as for `score`."""
    ngram: AtLeastOne[int] = 8
    """Number of consecutive words that a sample and a benchmark document share."""
    control: SetByStudy[OutputFolder[str]] = ""
    """Folder of a size-matched control: it loses as many samples without overlap, of the same lengths."""
    seed: SetByStudy[NonNegative[int]] = 0
    """Seed of the control."""
    task_folder: Input[str] = ""
    """Folder with YAML files of further tasks, as for `score`."""


@dataclass(frozen=True)
class LeakageConfig:
    """Measure the fraction of samples that contain training text verbatim."""

    corpus: Required[Input[str]] = ""
    """Corpus folder to examine."""
    texts: Required[Input[str]] = ""
    """Training text: a file with `text`, a data set of the hub (`org/name:SPLIT`), `.npy` token ids ([tokens] or
    [documents, tokens]), or a corpus folder."""
    out: Required[OutputFile[str]] = ""
    """JSON file to write, with `FILE.samples.parquet`."""
    min_match: AtLeastOne[int] = 50
    """Minimum length of a match in tokens."""
    tokenizer: Input[str] = ""
    """Model or tokenizer folder with the tokenizer of the corpus; required for JSONL."""
    text_field: str = "text"
    """Field of JSONL with the text."""
