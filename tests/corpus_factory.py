"""Files of texts, sampled corpora, rows and batches, as tests need them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from jax_selftrain import hub
from jax_selftrain.config import Packing
from jax_selftrain.corpus import Corpus, CorpusWriter, Mixture, PackedRows, Sample, build_packed_rows


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write one JSON object per line; return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_sampled_corpus(
    folder: Path, model: Path | str, samples: Sequence[Sample], *, per_shard: int | None = None, seed: int = 0
) -> Corpus:
    """Samples in the tokens of `model` (BOS 1, EOS 2), `per_shard` (default: all) to a shard."""
    request = {
        "kind": "sampled",
        "source": {"ref": "here", "fingerprint": "0" * 64},
        "tokenizer_fingerprint": hub.open_model(model).tokenizer_fingerprint,
        "start_id": 1,
        "stop_ids": [2],
        "policy": {},
        "seed": seed,
        "samples": len(samples),
        "samples_per_shard": per_shard or len(samples),
    }
    writer = CorpusWriter.open(folder, request)
    writer.convert_missing(samples, lambda found, ids: (found, {}))
    return writer.finalize()


def whole_mixture(rows: PackedRows) -> Mixture:
    """Return the mixture of one corpus."""
    return Mixture((rows,), (Fraction(1),))


def pack_corpus(corpus: Corpus, seq_len: int, packing: Packing) -> PackedRows:
    """Pack a corpus into rows in memory."""
    with TemporaryDirectory() as folder:
        rows = build_packed_rows(corpus, Path(folder, "rows"), seq_len, packing)
        arrays = (np.array(array) for array in (rows.tokens, rows.segments, rows.positions, rows.weights))
        return PackedRows(*arrays, rows.statistics)


def make_rows(n: int) -> PackedRows:
    """Make `n` rows of one position, for tests in which their content plays no part."""
    empty = np.zeros((n, 1), np.int32)
    return PackedRows(np.zeros((n, 2), np.int32), empty, empty, empty.astype(np.float32), {})


def batch_indices(n_rows: int, batch_size: int, seed: int, n: int) -> np.ndarray:
    """Return the rows of batch `n` of a single corpus, int64 [batch_size]."""
    return Mixture((make_rows(n_rows),), (Fraction(1),)).batch(batch_size, seed, n)[1]
