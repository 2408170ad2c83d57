"""Parquet schema of a corpus, and one sample of it.

`tokens` is authoritative; `text` serves readers and other tokenizers. `tokens` holds the stop id if it was sampled (or,
for imported text, appended), but not the start id, which is in `corpus.json`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("tokens", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("logprob", pa.float32()),
        ("finish_reason", pa.string()),
    ]
)

FINISH_REASONS = ("length", "stop")
"""Values of `finish_reason`; the index is the code in `Corpus.token_arrays`."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One text of a corpus."""

    sample_id: int
    tokens: np.ndarray
    """int32 [length], without the start id, with the stop id if there is one."""
    text: str
    logprob: float
    """Sum over tokens of log p under the source at temperature 1, in nats; NaN (null) if not sampled."""
    finish_reason: str
    """`stop` or `length`."""


def to_table(samples: Sequence[Sample]) -> pa.Table:
    """Convert samples to an Arrow table of `SCHEMA`.

    Raises:
        ValueError: a sample does not fit the schema.
    """
    for sample in samples:
        if sample.finish_reason not in FINISH_REASONS:
            raise ValueError(f"sample {sample.sample_id}: unknown finish_reason {sample.finish_reason!r}")
        if not np.issubdtype(sample.tokens.dtype, np.integer):
            raise ValueError(f"sample {sample.sample_id}: tokens must be integers")
    rows = [vars(sample) | {"logprob": None if np.isnan(sample.logprob) else sample.logprob} for sample in samples]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def to_samples(batch: pa.RecordBatch) -> Iterator[Sample]:
    """Yield the samples of an Arrow batch of `SCHEMA`, in order."""
    lists = batch.column("tokens")
    bounds = lists.offsets.to_numpy()
    flat = lists.values.to_numpy()
    logprobs = batch.column("logprob").to_numpy(zero_copy_only=False)  # nulls become NaN
    ids, texts, reasons = (batch.column(name).to_pylist() for name in ("sample_id", "text", "finish_reason"))
    for row, (sample_id, text, reason) in enumerate(zip(ids, texts, reasons, strict=True)):
        tokens = flat[bounds[row] : bounds[row + 1]]
        yield Sample(sample_id, tokens, text, float(logprobs[row]), reason)
