"""Resumable extraction by any number of processes; see `likelihood.resumable`.

The work unit is a block of sequences, a few whole batches of `extraction_metrics`. All batches have one shape, so a
block gives the same bits on every process, and as one call for all sequences.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from jax_selftrain import hub
from jax_selftrain.distributed import barrier, broadcast_one_to_all
from jax_selftrain.errors import InputError
from jax_selftrain.evals.exact_match import extraction_batch_size, extraction_metrics
from jax_selftrain.evals.suffix_probability import NamedSamplingParams
from jax_selftrain.io.manifest import hash_json
from jax_selftrain.io.work_queue import Claim, run_missing
from jax_selftrain.likelihood.resumable import (
    POLL_SECONDS,
    REMEDY,
    PartialResults,
    environment,
    load_unit,
    save_unit,
    spans_processes,
)

BATCHES_PER_BLOCK = 4


def extract_resumable(
    model: hub.LoadedModel,
    sequences: np.ndarray,
    prefix: int,
    parts: PartialResults,
    *,
    policies: Sequence[NamedSamplingParams],
    batch_tokens: int,
    greedy_decode: bool,
) -> dict[str, np.ndarray]:
    """Measure extraction, and keep finished blocks in `parts`; see `extraction_metrics`.

    Processes with their own meshes divide the blocks; processes that share a mesh measure every block together.

    Raises:
      InputError: see `extraction_metrics`; or a file in the folder is damaged.
    """
    is_shared = spans_processes(model.sharding_rules.mesh)
    size = BATCHES_PER_BLOCK * extraction_batch_size(model.sharding_rules, sequences.shape[1], batch_tokens)
    blocks = {first: sequences[first : first + size] for first in range(0, max(len(sequences), 1), size)}
    inputs: dict[str, Any] = {
        "identity": dict(parts.identity),
        "model": model.source.fingerprint,
        "sequences": hashlib.sha256(np.ascontiguousarray(sequences, np.int64).tobytes()).hexdigest(),
        "shape": list(sequences.shape),
        "prefix": prefix,
        "policies": [repr(named) for named in policies],
        "greedy_decode": greedy_decode,
        "batch_tokens": batch_tokens,
    }
    folder = parts.open(hash_json(inputs | environment(model))[:16])

    def measure(first: int) -> None:
        found = extraction_metrics(
            model, blocks[first], prefix, policies=policies, batch_tokens=batch_tokens, greedy_decode=greedy_decode
        )
        if not is_shared or jax.process_index() == 0:
            save_unit(_part(folder, first), pa.table(found))

    def measure_claimed(claims: Iterator[Claim[int]]) -> None:
        for claim in claims:
            with claim as first:
                measure(first)

    if is_shared:
        for first in _broadcast_missing(folder, blocks):
            measure(first)
        barrier(f"measured {folder}")
    else:
        run_missing(
            blocks,
            measure_claimed,
            is_done=lambda first: _part(folder, first).exists(),
            lease_file=lambda first: _part(folder, first).with_suffix(".lease"),
            poll_seconds=POLL_SECONDS,
        )
    tables = []
    for first, members in blocks.items():
        path = _part(folder, first)
        table, process = load_unit(path)
        if table.num_rows != len(members):
            raise InputError(f"{path}: does not hold the results of its block; {REMEDY}")
        tables.append(table)
        parts.units[process] += 1
    table = pa.concat_tables(tables)
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _broadcast_missing(folder: Path, blocks: dict[int, np.ndarray]) -> list[int]:
    """Return the blocks that process 0 finds missing."""
    return broadcast_one_to_all(lambda: [first for first in blocks if not _part(folder, first).exists()])


def _part(folder: Path, first: int) -> Path:
    return folder / f"block-{first:09d}.parquet"
