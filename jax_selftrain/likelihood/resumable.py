"""Resumable computation of work units by any number of processes.

All processes plan the same units: of likelihood requests (`likelihood.batching`), or of sequences. A process claims a
missing unit by lease, computes it, and commits its results as a Parquet file; when no unit is missing, every process
reads all files. So a restart computes only missing units, hosts with their own mesh share the work, and a lost host
costs its unfinished unit. A unit gives the same bits on every process.

The folder of the files is named by a hash of everything that determines the results: inputs, model, dtype, batch size,
mesh, library versions. Results of another model or task are therefore never read.
"""

import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jax.sharding import Mesh

from jax_selftrain import hub
from jax_selftrain.distributed import broadcast_one_to_all, live_processes, process_local
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.io.json_files import hash_json
from jax_selftrain.io.tables import load_table, write_table
from jax_selftrain.io.work_queue import run_missing
from jax_selftrain.likelihood.batching import default_batch_tokens, plan_units
from jax_selftrain.likelihood.engine import Likelihood, Requests, TokenScores, deduplicate, run_batches, with_progress
from jax_selftrain.version import versions

POLL_SECONDS = 0.5
"""Interval between checks of the units that other processes compute."""

_SUMS = tuple(name for name in Likelihood._fields if name != "token_scores")
_PROCESS, _INPUTS = b"process", b"inputs"
"""Metadata keys of the process that computed a file, and of the hash of its inputs."""


class DamagedUnitError(InputError):
    """A file of partial results that cannot be used."""


@dataclass
class PartialResults:
    """Folder of partial results, and counts of this process's work."""

    folder: Path
    """Removed by `finish`; it must hold nothing else."""
    requests: int = 0
    unique_requests: int = 0
    computed_requests: int = 0
    """Number of unique requests that this process computed."""
    units_by_process: Counter[str] = field(default_factory=Counter)
    """Number of units by the process that computed them, in this or an earlier attempt."""

    def counts(self) -> dict[str, Any]:
        """Return the counts for `FILE.timings.json`."""
        return {name: value for name, value in vars(self).items() if name != "folder"}

    def finish(self, write: Callable[[], None] = lambda: None) -> None:
        """Write the results on one process and remove the folder.

        All processes must call this. The first live process writes, after every other has read what it needs; if it is
        lost, the next one takes over. They communicate by files: after the loss of a process nothing else may be left.
        """
        me = jax.process_index()
        if jax.process_count() > 1:
            atomic.write_text(self.ready_file(me), "")
            while self.folder.exists() and live_processes()[0] != me:
                time.sleep(POLL_SECONDS)
            if not self.folder.exists():  # the process that has written may have ended since
                return
        while not all(self.ready_file(index).exists() for index in live_processes() if index != me):
            time.sleep(POLL_SECONDS)
        write()
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def discard_on_error(self) -> Iterator[None]:
        """Remove the folder if a model is refused inside.

        Partial results of such a model are useless. A damaged unit costs only itself.
        """
        try:
            yield
        except DamagedUnitError:
            raise
        except InputError:
            self.finish()
            raise

    def ready_file(self, process: int) -> Path:
        """Return the file that marks a process as done reading."""
        return self.folder / f"read-by-{process}"


def loglikelihoods(
    model: hub.LoadedModel,
    requests: Requests,
    *,
    batch_tokens: int | None = None,
    parts: PartialResults | None = None,
    token_scores: bool = False,
) -> list[Likelihood]:
    """Compute the log-likelihood of each continuation given its context.

    Args:
      model: from `hub.load_model`.
      requests: pairs of token ids (context, continuation), both non-empty.
      batch_tokens: token positions in one device batch, over the whole mesh; None: 512 per replica on a CPU, 8192
        elsewhere.
      parts: keeps finished units, which are not computed again; None: nothing is kept.
      token_scores: also return the scores of each token.

    Returns:
      One `Likelihood` per request, in their order. The caller must check for NaN.

    Raises:
      InputError: a request is empty, has ids outside the vocabulary, or a continuation longer than the model; or a file
        of `parts` is damaged.
    """
    unique, index = deduplicate(model.config, requests)
    units = plan_units(model.sharding_rules, model.config, unique, batch_tokens)
    found: dict[int, Likelihood] = {}
    if parts is None:
        for _, likelihoods in run_batches(model, with_progress(units), batch_tokens, token_scores=token_scores):
            found |= likelihoods
        return [found[i] for i in index]
    parts.requests += len(requests)
    parts.unique_requests += len(unique)
    if not units:
        return []
    digest = hashlib.sha256()
    for request in unique:
        _, tokens, num_targets = request.sort_key
        digest.update(len(tokens).to_bytes(8, "big") + num_targets.to_bytes(8, "big") + tokens)
    inputs = {
        "requests": digest.hexdigest(),
        "batch_tokens": batch_tokens or default_batch_tokens(model.sharding_rules),
        **({"token_scores": True} if token_scores else {}),
    }

    def compute(indices: Iterable[int]) -> Iterator[tuple[int, pa.Table]]:
        claimed = (units[i] for i in indices)
        for unit, likelihoods in run_batches(model, claimed, batch_tokens, token_scores=token_scores):
            yield unit.index, _to_table([likelihoods[i] for i in unit.request_ids])

    table = compute_units(model, parts, inputs, [unit.request_ids for unit in units], compute)
    found |= zip(table["item"].to_pylist(), _to_likelihoods(table), strict=True)
    return [found[i] for i in index]


def _to_table(likelihoods: Sequence[Likelihood]) -> pa.Table:
    """Return one row per likelihood, with lists of token scores."""
    *sums, each = map(list, zip(*likelihoods, strict=True))
    columns = dict(zip(_SUMS, sums, strict=True))
    if each[0] is not None:
        columns |= dict(zip(TokenScores._fields, map(list, zip(*each, strict=True)), strict=True))
    return pa.table(columns)


def _to_likelihoods(table: pa.Table) -> Iterator[Likelihood]:
    """Yield the likelihoods of a table from `_to_table`."""
    sums = zip(*(table[name].to_pylist() for name in _SUMS), strict=True)
    if not set(TokenScores._fields) <= set(table.column_names):
        yield from (Likelihood(*row) for row in sums)
        return
    lists = (split_lists(table[name]) for name in TokenScores._fields)
    for row, each in zip(sums, zip(*lists, strict=True), strict=True):
        yield Likelihood(*row)._replace(token_scores=TokenScores(*each))


def split_lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    """Return the lists of a column as views of one array."""
    ends = np.cumsum(pc.list_value_length(column).to_numpy())
    flat = pc.list_flatten(column).to_numpy()
    return np.split(flat, ends[:-1]) if len(ends) else []


def compute_units(
    model: hub.LoadedModel,
    parts: PartialResults,
    inputs: Mapping[str, Any],
    units: Sequence[Sequence[int]],
    compute: Callable[[Iterable[int]], Iterator[tuple[int, pa.Table]]],
) -> pa.Table:
    """Compute the units that `parts` lacks, together with the other processes.

    Processes with their own meshes divide the units; processes that share a mesh compute every unit together.

    Args:
      model: the model that all units are computed with.
      parts: keeps finished units.
      inputs: plain data that determines the results, in addition to the model and its mesh.
      units: ids of the items of each unit.
      compute: yields the index and the results, one row per item, of each unit of an iterable.

    Returns:
      The results of all units with their column `item`.

    Raises:
      InputError: a file in the folder is damaged.
    """
    rules = model.sharding_rules
    environment = {
        "model": model.source.fingerprint,
        "dtype": model.compute_dtype.name,
        "mesh": dict(rules.mesh.shape),
        "rules": dict(rules.logical_to_mesh),
        "device": rules.mesh.devices.flat[0].device_kind,
        "versions": versions(),
    }
    folder = parts.folder / hash_json({**inputs, "units": list(map(list, units)), **environment})[:16]
    folder.mkdir(parents=True, exist_ok=True)
    atomic.remove_stale_temp_files(folder)
    # The file may remain from an attempt that was interrupted at its very end.
    parts.ready_file(jax.process_index()).unlink(missing_ok=True)
    files = [folder / f"unit-{i:06d}.parquet" for i in range(len(units))]
    is_shared = spans_processes(rules.mesh)
    metadata = {_PROCESS: str(jax.process_index()).encode(), _INPUTS: folder.name.encode()}

    def run_claimed(claims: Iterator[tuple[int, ExitStack]]) -> None:
        held: dict[int, ExitStack] = {}

        def claimed_units() -> Iterator[int]:
            for i, claim in claims:
                held[i] = claim
                yield i

        for i, table in compute(claimed_units()):
            with held.pop(i):
                parts.computed_requests += len(units[i])
                if not is_shared or jax.process_index() == 0:
                    table = table.add_column(0, "item", pa.array(units[i], pa.int64()))
                    write_table(files[i], table.replace_schema_metadata(metadata))

    run_missing(
        range(len(units)),
        run_claimed,
        is_done=lambda i: files[i].exists(),
        lease_file=lambda i: files[i].with_suffix(".lease"),
        agree=broadcast_one_to_all if is_shared else lambda decide: decide(),
        poll_seconds=POLL_SECONDS,
        progress=with_progress,
    )
    return pa.concat_tables([_load(file, items, parts) for file, items in zip(files, units, strict=True)])


def spans_processes(mesh: Mesh) -> bool:
    """Return True if a mesh has devices of several processes."""
    return any(device.process_index != jax.process_index() for device in mesh.devices.flat)


def process_local_if_possible(mesh: Mesh) -> AbstractContextManager[None]:
    """Tolerate the loss of other processes if the mesh is local."""
    return nullcontext() if spans_processes(mesh) else process_local(mesh)


def _load(path: Path, items: Sequence[int], parts: PartialResults) -> pa.Table:
    """Read the results of a unit, and count it for its process."""
    remedy = "delete it and run the same command again to recompute it"
    try:
        table = load_table(path, remedy=remedy)
    except InputError as error:
        raise DamagedUnitError(str(error)) from error
    metadata = table.schema.metadata or {}
    is_own = metadata.get(_INPUTS) == path.parent.name.encode() and "item" in table.column_names
    if not is_own or table["item"].to_pylist() != list(items):
        raise DamagedUnitError(f"{path}: does not hold the results of its unit; {remedy}")
    parts.units_by_process[metadata.get(_PROCESS, b"?").decode()] += 1
    return table.replace_schema_metadata(None)
