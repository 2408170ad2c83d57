"""Likelihoods that survive an interruption, scored by any number of processes.

As in sampling, the unit of work is claimed, computed and committed whole. Every process makes the same list of units
from the same requests (see `scoring.units`), claims those that are missing by lease, and commits their answers as a
Parquet file; when none is missing, each reads them all. So a restart scores only what is missing, hosts with a mesh of
their own divide the work among them without waiting for each other, and a dead peer costs its unfinished unit. A unit
gives the same bits whoever computes it and whenever.

Everything that decides the answers – the requests, the model, its type, the batch and the mesh, the versions of the
libraries – is hashed into the name of the folder in which the files lie: those of another model or task are never
read. They are removed with all others once the results are written.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
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
from jax_selftrain.io import atomic, lease
from jax_selftrain.io.manifest import hash_json
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
"""How often to look whether a unit that another process works on has been finished or given up."""

_PART = pa.schema([("request", pa.int64()), ("loglikelihood", pa.float64()), ("is_greedy", pa.bool_())])
_PROCESS = b"process"
"""Under this key a part says which process has made it."""
REMEDY = "delete it and run the same command again, which makes it anew"
"""For a part that is damaged."""


@dataclass
class PartialResults:
    """A folder of answers, and what this process has done for it."""

    folder: Path
    """Removed by `finish`; it may hold nothing else."""
    identity: Mapping[str, Any]
    """What decides the answers beside the requests and how they are computed: fingerprints of model and tokenizer."""
    num_requests: int = 0
    """Requests so far."""
    num_unique: int = 0
    """Different ones among them."""
    num_computed: int = 0
    """Of these, those that this process has computed."""
    units: Counter[str] = field(default_factory=Counter)
    """Units by the number of the process that computed them, be it in an earlier attempt."""

    def counts(self) -> dict[str, Any]:
        """The counts, as plain data."""
        return {
            "requests": self.num_requests,
            "distinct_requests": self.num_unique,
            "scored_requests": self.num_computed,
            "units_of_process": dict(sorted(self.units.items())),
        }

    def open(self, name: str) -> Path:
        """The folder of answers of this name, in which all that is asked and how must be told by the name."""
        self.ready_file(jax.process_index()).unlink(
            missing_ok=True
        )  # of an attempt that was interrupted at its very end
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        atomic.remove_stale_temp_files(folder)
        return folder

    def finish(self, write: Callable[[], None] = lambda: None) -> None:
        """Have one process write the results and remove the folder. All processes must come here.

        It is the first of those that are there, and it waits until each of them has read what it needs. The others wait
        for it; if it is lost, the next takes its place. They tell each other by files, since a program of which a
        process was lost may have nothing else left to do so.
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
        shutil.rmtree(self.folder, ignore_errors=True)  # what could not be removed is in nobody's way

    def ready_file(self, process: int) -> Path:
        """The file that says that a process has read what it needs."""
        return self.folder / f"read-by-{process}"


def loglikelihoods_resumable(
    model: hub.LoadedModel, requests: Requests, parts: PartialResults, *, batch_tokens: int | None = None
) -> list[Likelihood]:
    """As `loglikelihoods`, but what has been scored is kept in `parts`, and what is there is not scored again.

    Several processes may share the folder. Those whose meshes are their own divide the units among them; those that
    share one mesh compute each unit together.

    Raises:
      InputError: a request cannot be answered, or a file in the folder is damaged.
    """
    distinct, which = deduplicate(model.config, requests)
    units = plan_units(model.sharding_rules, model.config, distinct, batch_tokens)
    folder = parts.open(_cache_key(model, distinct, units, parts.identity, batch_tokens))
    parts.num_requests += len(requests)
    parts.num_unique += len(distinct)
    together = spans_processes(model.sharding_rules.mesh)
    score = _score_on_shared_mesh if together else _score_claimed
    for unit, scores in score(model, units, folder, batch_tokens):
        parts.num_computed += len(scores)
        if not together or jax.process_index() == 0:
            _write(_part(folder, unit), distinct, scores)
    if together:
        barrier(f"scored {folder}")
    answers: dict[int, Likelihood] = {}
    for unit in units:
        found, process = _read(_part(folder, unit), distinct, unit)
        answers |= found
        parts.units[process] += 1
    return [answers[index] for index in which]


def spans_processes(mesh: Mesh) -> bool:
    """Whether a mesh holds devices of several processes, which must then compute everything together."""
    return any(device.process_index != jax.process_index() for device in mesh.devices.flat)


def process_local_if_possible(mesh: Mesh) -> AbstractContextManager[None]:
    """Needs nobody (`processes.on_its_own`) where the mesh is this process's own."""
    return nullcontext() if spans_processes(mesh) else process_local(mesh)


def _score_claimed(
    model: hub.LoadedModel, units: Sequence[WorkUnit], folder: Path, batch_tokens: int | None
) -> Iterator[tuple[WorkUnit, dict[int, TokenScores]]]:
    """The units that this process gets hold of, each claimed until the consumer has written it; ends when all are."""
    while missing := [unit for unit in units if not _part(folder, unit).exists()]:
        scored = False
        with ExitStack() as claims:
            held: dict[int, ExitStack] = {}
            for unit, scores in run_batches(model, _claimed(missing, folder, claims, held), batch_tokens):
                scored = True
                yield unit, scores
                held.pop(unit.index).close()
        if not scored:
            time.sleep(POLL_SECONDS)


def _claimed(
    missing: Sequence[WorkUnit], folder: Path, claims: ExitStack, held: dict[int, ExitStack]
) -> Iterator[WorkUnit]:
    """Those of the missing units that nobody else works on; their claims go to `held`, and end with `claims`."""
    for unit in with_progress(missing):
        with ExitStack() as claim:
            mine = claim.enter_context(lease.lease(_part(folder, unit).with_suffix(".lease")))
            if mine and not _part(folder, unit).exists():  # it may have been finished since `missing` was looked up
                held[unit.index] = claims.enter_context(claim.pop_all())
                yield unit


def _score_on_shared_mesh(
    model: hub.LoadedModel, units: Sequence[WorkUnit], folder: Path, batch_tokens: int | None
) -> Iterator[tuple[WorkUnit, dict[int, TokenScores]]]:
    """The units that process 0 finds missing, on a mesh that spans processes: all must do the same."""
    missing = broadcast_one_to_all(lambda: [not _part(folder, unit).exists() for unit in units])
    chosen = [unit for unit, absent in zip(units, missing, strict=True) if absent]
    return run_batches(model, with_progress(chosen), batch_tokens)


def _cache_key(
    model: hub.LoadedModel,
    distinct: Sequence[TokenizedRequest],
    units: Sequence[WorkUnit],
    identity: Mapping[str, Any],
    batch_tokens: int | None,
) -> str:
    """Of the folder for just these answers."""
    asked = hashlib.sha256()
    for request in distinct:
        tokens, count = request.key
        asked.update(len(tokens).to_bytes(8, "big") + count.to_bytes(8, "big") + tokens)
    decisive: dict[str, Any] = {
        "identity": dict(identity),
        "requests": asked.hexdigest(),
        "units": hash_json([unit.members for unit in units]),
        "batch_tokens": batch_tokens or default_batch_tokens(model.sharding_rules),
    }
    return hash_json(decisive | environment(model))[:16]


def environment(model: hub.LoadedModel) -> dict[str, Any]:
    """What decides the last bits of a model's answers beside what is asked and in which batches."""
    rules = model.sharding_rules
    return {
        "dtype": model.compute_dtype.name,
        "mesh": dict(rules.mesh.shape),
        "rules": dict(rules.logical_to_mesh),
        "device": rules.mesh.devices.flat[0].device_kind,
        "versions": versions(),
    }


def _part(folder: Path, unit: WorkUnit) -> Path:
    return folder / f"part-{unit.index:06d}.parquet"


def _write(path: Path, distinct: Sequence[TokenizedRequest], scores: Mapping[int, TokenScores]) -> None:
    answers = {index: sum_token_scores(distinct[index], scores[index]) for index in sorted(scores)}
    columns = [
        list(answers),
        [answer.loglikelihood for answer in answers.values()],
        [answer.is_greedy for answer in answers.values()],
    ]
    arrays = [pa.array(column, kind.type) for column, kind in zip(columns, _PART, strict=True)]
    save_unit(path, pa.Table.from_arrays(arrays, schema=_PART))


def _read(path: Path, distinct: Sequence[TokenizedRequest], unit: WorkUnit) -> tuple[dict[int, Likelihood], str]:
    """The answers of a unit, and the number of the process that computed them."""
    table, process = load_unit(path)
    members = sorted(unit.members)
    if not table.schema.equals(_PART) or table.column("request").to_pylist() != members:
        raise InputError(f"{path}: does not hold the answers of its unit; {REMEDY}")
    answers = {
        index: Likelihood(value, greedy, distinct[index].num_targets)
        for index, value, greedy in zip(
            members, table.column("loglikelihood").to_pylist(), table.column("is_greedy").to_pylist(), strict=True
        )
    }
    return answers, process


def save_unit(path: Path, table: pa.Table) -> None:
    """Commit a part, with checksums and the number of this process."""
    signed = table.replace_schema_metadata({_PROCESS: str(jax.process_index()).encode()})
    with atomic.commit_file(path) as aside:
        pq.write_table(signed, aside, write_page_checksum=True)


def load_unit(path: Path) -> tuple[pa.Table, str]:
    """A part, and the number of the process that has made it.

    Raises:
      InputError: the file is damaged.
    """
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}); {REMEDY}") from error
    return table.replace_schema_metadata(None), (table.schema.metadata or {}).get(_PROCESS, b"?").decode()
