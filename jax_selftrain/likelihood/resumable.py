"""Resumable scoring by any number of processes.

All processes plan the same work units (`likelihood.batching`). A process claims a missing unit by lease, computes it,
and commits its results as a Parquet file; when no unit is missing, every process reads all files. So a restart computes
only missing units, hosts with their own mesh share the work, and a lost host costs its unfinished unit. A unit gives
the same bits on every process.

The folder of the files is named by a hash of everything that determines the results: requests, model, dtype, batch
size, mesh, library versions. Results of another model or task are therefore never read.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh

from jax_selftrain import hub
from jax_selftrain.distributed import barrier, broadcast_one_to_all, live_processes, process_local
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.io.manifest import hash_json
from jax_selftrain.io.work_queue import Claim, run_missing
from jax_selftrain.likelihood.batching import WorkUnit, default_batch_tokens, plan_units
from jax_selftrain.likelihood.engine import (
    Likelihood,
    Requests,
    TokenScores,
    deduplicate,
    run_batches,
    sum_token_scores,
    with_progress,
)
from jax_selftrain.likelihood.prefix_trie import TokenizedRequest
from jax_selftrain.version import versions

POLL_SECONDS = 0.5
"""Interval between checks of the units that other processes compute."""

_SCHEMA = pa.schema([("request", pa.int64()), ("loglikelihood", pa.float64()), ("is_greedy", pa.bool_())])
_PROCESS = b"process"
"""Metadata key of the process that computed a file."""
REMEDY = "delete it and run the same command again to recompute it"
"""Last clause of the error sentence about a damaged file."""


@dataclass
class PartialResults:
    """Folder of partial results, and counts of this process's work."""

    folder: Path
    """Removed by `finish`; it must hold nothing else."""
    identity: Mapping[str, Any]
    """Fingerprints of the inputs that determine the results, for instance of model and tokenizer."""
    num_requests: int = 0
    num_unique: int = 0
    num_computed: int = 0
    """Number of unique requests that this process computed."""
    units: Counter[str] = field(default_factory=Counter)
    """Number of units by the process that computed them, in this or an earlier attempt."""

    def counts(self) -> dict[str, Any]:
        """Return the counts for `FILE.timings.json`."""
        return {
            "requests": self.num_requests,
            "unique_requests": self.num_unique,
            "computed_requests": self.num_computed,
            "units_by_process": dict(sorted(self.units.items())),
        }

    def open(self, key: str) -> Path:
        """Create the folder of a cache key, which must identify all inputs."""
        # The file may remain from an attempt that was interrupted at its very end.
        self.ready_file(jax.process_index()).unlink(missing_ok=True)
        folder = self.folder / key
        folder.mkdir(parents=True, exist_ok=True)
        atomic.remove_stale_temp_files(folder)
        return folder

    def finish(self, write: Callable[[], None] = lambda: None) -> None:
        """Write the results on one process and remove the folder.

        All processes must call this. The first live process writes, after every other has read what it needs; if it is
        lost, the next one takes over. They communicate by files: after the loss of a process nothing else may be left.
        """
        me = jax.process_index()
        if jax.process_count() > 1:
            atomic.write_text(self.ready_file(me), "")
        while live_processes()[0] != me:
            if not self.folder.exists():
                return
            time.sleep(POLL_SECONDS)
        while not all(self.ready_file(index).exists() for index in live_processes() if index != me):
            time.sleep(POLL_SECONDS)
        write()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ready_file(self, process: int) -> Path:
        """Return the file that marks a process as done reading."""
        return self.folder / f"read-by-{process}"


def loglikelihoods_resumable(
    model: hub.LoadedModel, requests: Requests, parts: PartialResults, *, batch_tokens: int | None = None
) -> list[Likelihood]:
    """Compute log-likelihoods, and keep finished units in `parts`; see `engine.loglikelihoods`.

    Processes with their own meshes divide the units; processes that share a mesh compute every unit together.

    Raises:
      InputError: a request cannot be scored, or a file in the folder is damaged.
    """
    unique, index = deduplicate(model.config, requests)
    units = plan_units(model.sharding_rules, model.config, unique, batch_tokens)
    folder = parts.open(_cache_key(model, unique, units, parts.identity, batch_tokens))
    parts.num_requests += len(requests)
    parts.num_unique += len(unique)
    is_shared = spans_processes(model.sharding_rules.mesh)

    def commit(unit: WorkUnit, scores: dict[int, TokenScores]) -> None:
        parts.num_computed += len(scores)
        if not is_shared or jax.process_index() == 0:
            _write(_unit_file(folder, unit), unique, scores)

    if is_shared:
        for unit, scores in _score_on_shared_mesh(model, units, folder, batch_tokens):
            commit(unit, scores)
        barrier(f"scored {folder}")
    else:
        _score_missing(model, units, folder, batch_tokens, commit)
    likelihoods: dict[int, Likelihood] = {}
    for unit in units:
        found, process = _read(_unit_file(folder, unit), unique, unit)
        likelihoods |= found
        parts.units[process] += 1
    return [likelihoods[i] for i in index]


def spans_processes(mesh: Mesh) -> bool:
    """Return True if a mesh has devices of several processes."""
    return any(device.process_index != jax.process_index() for device in mesh.devices.flat)


def process_local_if_possible(mesh: Mesh) -> AbstractContextManager[None]:
    """Tolerate the loss of other processes if the mesh is local."""
    return nullcontext() if spans_processes(mesh) else process_local(mesh)


def _score_missing(
    model: hub.LoadedModel,
    units: Sequence[WorkUnit],
    folder: Path,
    batch_tokens: int | None,
    commit: Callable[[WorkUnit, dict[int, TokenScores]], None],
) -> None:
    """Claim, score and commit missing units until none is missing."""

    def score_claimed(claims: Iterator[Claim[WorkUnit]]) -> None:
        held: dict[int, Claim[WorkUnit]] = {}

        def claimed_units() -> Iterator[WorkUnit]:
            for claim in claims:
                held[claim.task.index] = claim
                yield claim.task

        for unit, scores in run_batches(model, claimed_units(), batch_tokens):
            with held.pop(unit.index):
                commit(unit, scores)

    run_missing(
        units,
        score_claimed,
        is_done=lambda unit: _unit_file(folder, unit).exists(),
        lease_file=lambda unit: _unit_file(folder, unit).with_suffix(".lease"),
        poll_seconds=POLL_SECONDS,
        progress=with_progress,
    )


def _score_on_shared_mesh(
    model: hub.LoadedModel, units: Sequence[WorkUnit], folder: Path, batch_tokens: int | None
) -> Iterator[tuple[WorkUnit, dict[int, TokenScores]]]:
    """Score the units that process 0 finds missing."""
    missing = broadcast_one_to_all(lambda: [not _unit_file(folder, unit).exists() for unit in units])
    chosen = [unit for unit, absent in zip(units, missing, strict=True) if absent]
    return run_batches(model, with_progress(chosen), batch_tokens)


def _cache_key(
    model: hub.LoadedModel,
    unique: Sequence[TokenizedRequest],
    units: Sequence[WorkUnit],
    identity: Mapping[str, Any],
    batch_tokens: int | None,
) -> str:
    """Hash everything that determines the results."""
    digest = hashlib.sha256()
    for request in unique:
        _, tokens, num_targets = request.sort_key
        digest.update(len(tokens).to_bytes(8, "big") + num_targets.to_bytes(8, "big") + tokens)
    inputs: dict[str, Any] = {
        "identity": dict(identity),
        "requests": digest.hexdigest(),
        "units": hash_json([unit.request_ids for unit in units]),
        "batch_tokens": batch_tokens or default_batch_tokens(model.sharding_rules),
    }
    return hash_json(inputs | environment(model))[:16]


def environment(model: hub.LoadedModel) -> dict[str, Any]:
    """Return the execution settings that determine the last bits."""
    rules = model.sharding_rules
    return {
        "dtype": model.compute_dtype.name,
        "mesh": dict(rules.mesh.shape),
        "rules": dict(rules.logical_to_mesh),
        "device": rules.mesh.devices.flat[0].device_kind,
        "versions": versions(),
    }


def _unit_file(folder: Path, unit: WorkUnit) -> Path:
    return folder / f"unit-{unit.index:06d}.parquet"


def _write(path: Path, unique: Sequence[TokenizedRequest], scores: Mapping[int, TokenScores]) -> None:
    rows = {i: sum_token_scores(unique[i], scores[i]) for i in sorted(scores)}
    columns = [
        list(rows),
        [row.loglikelihood for row in rows.values()],
        [row.is_greedy for row in rows.values()],
    ]
    arrays = [pa.array(column, kind.type) for column, kind in zip(columns, _SCHEMA, strict=True)]
    save_unit(path, pa.Table.from_arrays(arrays, schema=_SCHEMA))


def _read(path: Path, unique: Sequence[TokenizedRequest], unit: WorkUnit) -> tuple[dict[int, Likelihood], str]:
    """Read the results of a unit, and its process index."""
    table, process = load_unit(path)
    request_ids = sorted(unit.request_ids)
    if not table.schema.equals(_SCHEMA) or table.column("request").to_pylist() != request_ids:
        raise InputError(f"{path}: does not hold the results of its unit; {REMEDY}")
    columns = (table.column(name).to_pylist() for name in ("loglikelihood", "is_greedy"))
    likelihoods = {
        i: Likelihood(value, is_greedy, unique[i].num_targets)
        for i, value, is_greedy in zip(request_ids, *columns, strict=True)
    }
    return likelihoods, process


def save_unit(path: Path, table: pa.Table) -> None:
    """Commit the results of a unit with page checksums and process index."""
    signed = table.replace_schema_metadata({_PROCESS: str(jax.process_index()).encode()})
    with atomic.commit_file(path) as temp:
        pq.write_table(signed, temp, write_page_checksum=True)


def load_unit(path: Path) -> tuple[pa.Table, str]:
    """Read the results of a unit, and its process index.

    Raises:
      InputError: the file is damaged.
    """
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}); {REMEDY}") from error
    return table.replace_schema_metadata(None), (table.schema.metadata or {}).get(_PROCESS, b"?").decode()
