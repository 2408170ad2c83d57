"""Extraction that survives an interruption, by any number of processes: `scoring.parts`, for blocks of sequences.

A block is a few whole batches of `memorisation.measure`, whose batches have one shape: so its numbers are the same
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

from jax_selftrain import hub, storage
from jax_selftrain.errors import InputError
from jax_selftrain.processes import barrier, from_process_0
from jax_selftrain.scoring.memorisation import measure, rows_of
from jax_selftrain.scoring.parts import (
    POLL_SECONDS,
    REMEDY,
    Parts,
    circumstances,
    read_part,
    spans_processes,
    write_part,
)
from jax_selftrain.scoring.policies import NamedPolicy

BATCHES = 4
"""In a block."""


def measure_in_parts(
    model: hub.LoadedModel,
    sequences: np.ndarray,
    prefix: int,
    parts: Parts,
    *,
    policies: Sequence[NamedPolicy],
    batch_tokens: int,
    free_running: bool,
) -> dict[str, np.ndarray]:
    """As `memorisation.measure`, but what has been measured is kept in `parts`, and what is there not measured again.

    Several processes may share the folder. Those whose meshes are their own divide the blocks among them; those that
    share one mesh measure each block together.

    Raises:
      InputError: as `measure`; or a file in the folder is damaged.
    """
    together = spans_processes(model.layout.mesh)
    size = BATCHES * rows_of(model.layout, sequences.shape[1], batch_tokens)
    blocks = {first: sequences[first : first + size] for first in range(0, max(len(sequences), 1), size)}
    decisive: dict[str, Any] = {
        "identity": dict(parts.identity),
        "model": hub.model_fingerprint(model.source.ref),
        "sequences": hashlib.sha256(np.ascontiguousarray(sequences, np.int64).tobytes()).hexdigest(),
        "shape": list(sequences.shape),
        "prefix": prefix,
        "policies": [repr(named) for named in policies],
        "free_running": free_running,
        "batch_tokens": batch_tokens,
    }
    folder = parts.open(storage.fingerprint(decisive | circumstances(model))[:16])
    for first in _missing_together(folder, blocks) if together else _claimed(folder, blocks):
        found = measure(
            model, blocks[first], prefix, policies=policies, batch_tokens=batch_tokens, free_running=free_running
        )
        if not together or jax.process_index() == 0:
            write_part(_part(folder, first), pa.table(found))
    if together:
        barrier(f"measured {folder}")
    tables = []
    for first, members in blocks.items():
        path = _part(folder, first)
        table, process = read_part(path)
        if table.num_rows != len(members):
            raise InputError(f"{path}: does not hold the numbers of its block; {REMEDY}")
        tables.append(table)
        parts.units[process] += 1
    table = pa.concat_tables(tables)
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _missing_together(folder: Path, blocks: dict[int, np.ndarray]) -> list[int]:
    """The blocks that process 0 finds missing, on a mesh that spans processes: all must do the same."""
    return from_process_0(lambda: [first for first in blocks if not _part(folder, first).exists()])


def _claimed(folder: Path, blocks: dict[int, np.ndarray]) -> Iterator[int]:
    """The blocks that this process gets hold of, each claimed until the consumer comes back; ends when all are done."""
    while missing := [first for first in blocks if not _part(folder, first).exists()]:
        measured = False
        for first in missing:
            with ExitStack() as claim:
                mine = claim.enter_context(storage.lease(_part(folder, first).with_suffix(".lease")))
                if mine and not _part(folder, first).exists():  # it may have been finished since it was looked up
                    measured = True
                    yield first
        if not measured:
            time.sleep(POLL_SECONDS)


def _part(folder: Path, first: int) -> Path:
    return folder / f"block-{first:09d}.parquet"
