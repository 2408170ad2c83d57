"""Extraction that survives an interruption, by any number of processes: `scoring.parts`, for blocks of sequences.

A block is a few whole batches of `memorization.measure`, whose batches have one shape: so its numbers are the same
bits whoever measures it, and as if all sequences had been measured at once.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from jax_selftrain import hub
from jax_selftrain.distributed import barrier, broadcast_one_to_all
from jax_selftrain.errors import InputError
from jax_selftrain.evals.exact_match import batch_rows, extraction_metrics
from jax_selftrain.evals.suffix_probability import NamedSamplingParams
from jax_selftrain.io import lease
from jax_selftrain.io.manifest import hash_json
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
"""In a block."""


def extract_resumable(
    model: hub.LoadedModel,
    sequences: np.ndarray,
    prefix: int,
    parts: PartialResults,
    *,
    policies: Sequence[NamedSamplingParams],
    batch_tokens: int,
    free_running: bool,
) -> dict[str, np.ndarray]:
    """As `memorization.measure`, but what has been measured is kept in `parts`, and what is there not measured again.

    Several processes may share the folder. Those whose meshes are their own divide the blocks among them; those that
    share one mesh measure each block together.

    Raises:
      InputError: as `extraction_metrics`; or a file in the folder is damaged.
    """
    together = spans_processes(model.sharding_rules.mesh)
    size = BATCHES_PER_BLOCK * batch_rows(model.sharding_rules, sequences.shape[1], batch_tokens)
    blocks = {first: sequences[first : first + size] for first in range(0, max(len(sequences), 1), size)}
    decisive: dict[str, Any] = {
        "identity": dict(parts.identity),
        "model": hub.open_model(model.source.ref).fingerprint,
        "sequences": hashlib.sha256(np.ascontiguousarray(sequences, np.int64).tobytes()).hexdigest(),
        "shape": list(sequences.shape),
        "prefix": prefix,
        "policies": [repr(named) for named in policies],
        "free_running": free_running,
        "batch_tokens": batch_tokens,
    }
    folder = parts.open(hash_json(decisive | environment(model))[:16])
    for first in _broadcast_missing(folder, blocks) if together else _claimed(folder, blocks):
        found = extraction_metrics(
            model, blocks[first], prefix, policies=policies, batch_tokens=batch_tokens, free_running=free_running
        )
        if not together or jax.process_index() == 0:
            save_unit(_part(folder, first), pa.table(found))
    if together:
        barrier(f"measured {folder}")
    tables = []
    for first, members in blocks.items():
        path = _part(folder, first)
        table, process = load_unit(path)
        if table.num_rows != len(members):
            raise InputError(f"{path}: does not hold the numbers of its block; {REMEDY}")
        tables.append(table)
        parts.units[process] += 1
    table = pa.concat_tables(tables)
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _broadcast_missing(folder: Path, blocks: dict[int, np.ndarray]) -> list[int]:
    """The blocks that process 0 finds missing, on a mesh that spans processes: all must do the same."""
    return broadcast_one_to_all(lambda: [first for first in blocks if not _part(folder, first).exists()])


def _claimed(folder: Path, blocks: dict[int, np.ndarray]) -> Iterator[int]:
    """The blocks that this process gets hold of, each claimed until the consumer comes back; ends when all are done."""
    while missing := [first for first in blocks if not _part(folder, first).exists()]:
        measured = False
        for first in missing:
            with ExitStack() as claim:
                mine = claim.enter_context(lease.lease(_part(folder, first).with_suffix(".lease")))
                if mine and not _part(folder, first).exists():  # it may have been finished since it was looked up
                    measured = True
                    yield first
        if not measured:
            time.sleep(POLL_SECONDS)


def _part(folder: Path, first: int) -> Path:
    return folder / f"block-{first:09d}.parquet"
