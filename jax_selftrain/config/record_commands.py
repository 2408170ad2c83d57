"""Options of the commands that read token records."""

from dataclasses import dataclass
from typing import Annotated

from jax_selftrain.config.metadata import AtLeastOne, Input, NonNegative, OutputFile, Range, Required


@dataclass(frozen=True)
class MembershipConfig:
    """Measure membership inference: the separation of training text from other text."""

    records: Required[Input[str]] = ""
    """Token records of the model (`FILE.tokens.parquet` of `score` or `extract`)."""
    members: Required[str] = ""
    """Set of the records that is training text."""
    nonmembers: Required[str] = ""
    """Set of the records that is other text, of the same kind."""
    out: Required[OutputFile[str]] = ""
    """JSON file to write, with `FILE.documents.parquet`."""
    reference: Input[str] = ""
    """Token records of another model of the same tokens, for the score `reference`."""
    k: Annotated[float, Range("above 0 and at most 100", lambda value: 0 < value <= 100)] = 20.0
    """Percentage of the tokens that Min-K% and Min-K%++ average."""
    seed: NonNegative[int] = 0
    """Seed of the bootstrap."""
    resamples: Annotated[int, Range("at least 100", lambda value: value >= 100)] = 9999
    """Bootstrap resamples."""


@dataclass(frozen=True)
class TokenGapConfig:
    """Measure which tokens a student predicts worse than its base."""

    base: Required[Input[str]] = ""
    """Token records of the base (`FILE.tokens.parquet` of `score` or `extract`)."""
    student: Required[Input[str]] = ""
    """Token records of the student, of the same texts."""
    out: Required[OutputFile[str]] = ""
    """JSON file to write, with `FILE.top_documents.parquet` and `FILE.top_tokens.parquet`."""
    rare_count: AtLeastOne[int] = 5
    """A word is rare if it occurs fewer times in the texts of the records."""
    top: AtLeastOne[int] = 100
    """Rows of the tables of largest losses."""
