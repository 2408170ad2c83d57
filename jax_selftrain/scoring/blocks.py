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

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jax_selftrain import hub, storage
from jax_selftrain.errors import InputError
from jax_selftrain.processes import barrier, from_process_0
from jax_selftrain.scoring.memorisation import measure, rows_of
from jax_selftrain.scoring.parts import POLL_SECONDS, PROCESS, Parts, spans_processes
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
    folder = parts.folder / _name(model, sequences, prefix, parts, policies, batch_tokens, free_running)
    parts.mark(jax.process_index()).unlink(missing_ok=True)  # of an attempt that was interrupted at its very end
    folder.mkdir(parents=True, exist_ok=True)
    storage.clean_leftovers(folder)
    for first in _missing_together(folder, blocks) if together else _claimed(folder, blocks):
        found = measure(
            model, blocks[first], prefix, policies=policies, batch_tokens=batch_tokens, free_running=free_running
        )
        if not together or jax.process_index() == 0:
            _write(_part(folder, first), found)
    if together:
        barrier(f"measured {folder}")
    tables = []
    for first, members in blocks.items():
        table, process = _read(_part(folder, first), len(members))
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


def _name(
    model: hub.LoadedModel,
    sequences: np.ndarray,
    prefix: int,
    parts: Parts,
    policies: Sequence[NamedPolicy],
    batch_tokens: int,
    free_running: bool,
) -> str:
    """Of the folder for just these numbers."""
    layout = model.layout
    return storage.fingerprint(
        {
            "identity": dict(parts.identity),
            "model": hub.model_fingerprint(model.source.ref),
            "sequences": hashlib.sha256(np.ascontiguousarray(sequences, np.int64).tobytes()).hexdigest(),
            "shape": list(sequences.shape),
            "prefix": prefix,
            "policies": [repr(named) for named in policies],
            "free_running": free_running,
            "dtype": model.compute_dtype.name,
            "batch_tokens": batch_tokens,
            "mesh": dict(layout.mesh.shape),
            "rules": dict(layout.rules),
            "device": layout.mesh.devices.flat[0].device_kind,
            "versions": storage.versions(),
        }
    )[:16]


def _part(folder: Path, first: int) -> Path:
    return folder / f"block-{first:09d}.parquet"


def _write(path: Path, found: dict[str, np.ndarray]) -> None:
    table = pa.table(found).replace_schema_metadata({PROCESS: str(jax.process_index()).encode()})
    with storage.commit_file(path) as aside:
        pq.write_table(table, aside, write_page_checksum=True)


def _read(path: Path, rows: int) -> tuple[pa.Table, str]:
    """The numbers of a block, and the number of the process that measured them."""
    remedy = "delete it and run the same command again, which measures it anew"
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}); {remedy}") from error
    if table.num_rows != rows:
        raise InputError(f"{path}: does not hold the numbers of its block; {remedy}")
    return table.replace_schema_metadata(None), (table.schema.metadata or {}).get(PROCESS, b"?").decode()
