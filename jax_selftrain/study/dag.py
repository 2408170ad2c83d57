"""Stages of a study, named by everything that decides the output.

Keys are known before any work is done. Cells with the same corpus or base scores therefore share the stage, and a study
whose configuration grows keeps its finished stages. `STUDY/stages/COMMAND-KEY/` holds the output of a stage. Its
record `COMMAND-KEY.json`, written when it is done, has the checksums of its results. Several processes may work in one
folder: each claims by lease the first stage that is ready. An interrupted stage leaves an unfinished folder, which the
next process completes.
"""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import jax

from jax_selftrain.config import KeepModels
from jax_selftrain.distributed import broadcast_one_to_all
from jax_selftrain.distributed.progress import log_line
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic, json_files
from jax_selftrain.io.json_files import hash_json
from jax_selftrain.io.lease import lease
from jax_selftrain.io.manifest import manifest_entry, verify_checksums
from jax_selftrain.io.work_queue import run_missing
from jax_selftrain.version import versions

STAGE_FORMAT = 3
"""Version of the output of stages; raise it when a stage writes other files or other numbers."""

_FLAGS_WITHOUT_EFFECT = ("--xla_dump", "--xla_force_host_platform_device_count")
"""Beginnings of XLA flags that do not change numbers."""

_RESULTS = re.compile(r"(?!shard-|launches\.|(.*\.)?timings\.)[^.].*\.(json|jsonl|parquet)")
"""Files that studies read, of those at the top of a stage's folder; the checksums of shards are in `corpus.json`."""

_JAX_OPTIONS = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_x64",
    "jax_threefry_partitionable",
)


@cache
def numerical_environment() -> dict[str, Any]:
    """Return versions, device kind, XLA flags and JAX options that decide numbers."""
    device = jax.local_devices()[0]
    words = [word for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") for word in os.environ.get(name, "").split()]
    return {
        **{name: versions()[name] for name in ("jax", "jaxlib")},
        "platform": device.platform,
        "device_kind": device.device_kind,
        "flags": sorted(word for word in words if not word.startswith(_FLAGS_WITHOUT_EFFECT)),
        "options": {name: getattr(jax.config, name) for name in _JAX_OPTIONS},
    }


Inputs = Mapping[str, "str | Stage"]
"""Stages, and fingerprints of models and files from outside."""


@dataclass(frozen=True, eq=False)
class Stage:
    """A node of the study's graph."""

    command: str
    """Kind of stage: sample, retokenize, train, …"""
    label: str
    """Description for logs and the report."""
    identity: Mapping[str, Any]
    """Every option that decides the output, as plain data."""
    inputs: Inputs
    run: Callable[[Path], object] = field(repr=False)
    """Fill the stage's folder, or complete it, after all inputs are done."""
    tokens: int = 0
    """Upper bound of the tokens that are sampled or trained on."""
    flops: float = 0.0
    """FLOPs for these tokens, by the convention of `training.flops_per_token`."""
    is_collective: bool = False
    """All processes of a distributed program run it together; of other stages, process 0."""
    needs_devices: bool = False
    """Computes on devices; such a stage that is not collective runs in programs of one process only."""
    model_bytes: int = 0
    """Size of the model that it writes, in float32."""

    @cached_property
    def record(self) -> dict[str, Any]:
        """Everything that decides the output, as plain data."""
        return {
            "format": STAGE_FORMAT,
            "environment": numerical_environment(),
            "command": self.command,
            "identity": dict(self.identity),
            "inputs": {name: one.key if isinstance(one, Stage) else one for name, one in self.inputs.items()},
        }

    @cached_property
    def key(self) -> str:
        """SHA-256 of `record`, in hex."""
        return hash_json(self.record)

    @property
    def name(self) -> str:
        """Name of the stage's folder."""
        return f"{self.command}-{self.key[:16]}"

    @property
    def dependencies(self) -> list["Stage"]:
        """Inputs that are stages."""
        return [one for one in self.inputs.values() if isinstance(one, Stage)]


def is_done(root: Path, stage: Stage) -> bool:
    """Return True if the stage is finished.

    Raises InputError if the record is damaged, or the stage's folder is missing.
    """
    path = root / f"{stage.name}.json"
    if not path.exists():
        return False
    record = json_files.read_json(path)
    if not isinstance(record, dict) or record.get("key") != stage.key:
        raise InputError(f"{path}: is damaged; delete it and run the same command again")
    if not (root / stage.name).is_dir():
        raise InputError(f"{root / stage.name}: is missing, but its record exists; delete {path} and run again")
    return True


def topological_order(targets: Iterable[Stage]) -> list[Stage]:
    """Return the stages and their dependencies, each once, dependencies first."""
    found: dict[str, Stage] = {}

    def add(stage: Stage) -> None:
        if stage.key not in found:
            for dependency in stage.dependencies:
                add(dependency)
            found[stage.key] = stage

    for stage in targets:
        add(stage)
    return list(found.values())


def check_processes(stages: Iterable[Stage]) -> None:
    """Refuse stages that processes of one program cannot run together. Raises InputError."""
    single = [stage.label for stage in stages if stage.needs_devices and not stage.is_collective]
    if single and jax.process_count() > 1:
        raise InputError(
            f"cannot {single[0]} in a program of {jax.process_count()} processes; start the command on every host "
            "with --num-processes 1: the hosts then share the stages"
        )


def run_all(root: Path, stages: Sequence[Stage], keep_models: KeepModels = "all") -> None:
    """Run all stages and their dependencies; return when all are done.

    Processes that share the folder share the stages. The processes of one distributed program run every stage together,
    and process 0 claims it. `keep_models`: see `StudyConfig`.
    """
    stages = topological_order(stages)
    check_processes(stages)
    if jax.process_index() == 0:
        root.mkdir(parents=True, exist_ok=True)
        atomic.remove_stale_temp_files(root)
    done: set[str] = set()
    readers = _readers(stages)

    def remove_weights(candidates: Iterable[Stage]) -> None:
        if keep_models != "all" and jax.process_index() == 0:
            for one in candidates:
                if one.model_bytes:
                    _remove_weights(root, one, all_weights=keep_models == "none" and readers[one.key] <= done)

    def finish(stage: Stage) -> None:
        if stage.key not in done:
            done.add(stage.key)
            remove_weights((stage, *stage.dependencies))
            log_line(f"stage {len(done)} of {len(stages)} done: {stage.label}")

    def run_claimed(claims: Iterator[tuple[Stage, ExitStack]]) -> None:
        for stage, claim in claims:
            with claim:
                log_line(f"stage begins: {stage.label}")
                _make_removed_again(root, stage)
                _run(root, stage)
            finish(stage)

    run_missing(
        stages,
        run_claimed,
        is_done=partial(is_done, root),
        lease_file=partial(_lease_file, root),
        is_ready=lambda stage: all(one.key in done for one in stage.dependencies),
        agree=broadcast_one_to_all,
        on_done=finish,
    )
    remove_weights(stages)  # also models that were made again


def _run(root: Path, stage: Stage) -> None:
    folder = root / stage.name
    broadcast_one_to_all(partial(folder.mkdir, exist_ok=True))
    began = time.monotonic()
    if stage.is_collective:
        stage.run(folder)
    else:
        broadcast_one_to_all(partial(_discard_result, stage.run, folder), has_deadline=False)
    if jax.process_index() == 0:
        spent = {"seconds": time.monotonic() - began, "devices": jax.device_count()}
        json_files.write_json(root / f"{stage.name}.seconds.json", spent)
        record = {"key": stage.key, **stage.record, "files": _describe_results(folder)}
        json_files.write_json(root / f"{stage.name}.json", record)


def _describe_results(folder: Path) -> dict[str, Any]:
    """Return checksum and size of the results of a stage."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and _RESULTS.fullmatch(path.name))
    return {path.name: manifest_entry(path) for path in paths}


def verify_results(root: Path, stages: Iterable[Stage]) -> None:
    """Compare the results of finished stages with their records.

    Raises InputError if a file is missing, changed, or of another stage.
    """
    for stage in stages:
        path = root / f"{stage.name}.json"
        files = json_files.read_json(path).get("files", {})
        hint = f"delete {root / stage.name} and {path.name}, and run the same command again"
        verify_checksums(root / stage.name, files, fix_hint=hint)


def _discard_result(run: Callable[[Path], object], folder: Path) -> None:
    run(folder)


# ---------------------------------------------------------------- models that are removed


def list_remaining(root: Path, stages: Iterable[Stage]) -> list[Stage]:
    """Return the stages to run, dependencies first.

    They are those that are not done, and those whose removed model one of them reads.
    """

    pending = [stage for stage in stages if not is_done(root, stage)]
    found = {stage.key: stage for stage in pending}
    while pending:
        for one in pending.pop().dependencies:
            if one.key not in found and _is_removed(root, one):
                found[one.key] = one
                pending.append(one)
    return [stage for stage in topological_order(found.values()) if stage.key in found]


def peak_bytes(stages: Sequence[Stage], keep_models: KeepModels, checkpoints: int) -> int:
    """Return the largest size of the files that stages hold together.

    The stages run in order, and their models are kept as `keep_models` says. A run has `checkpoints` checkpoints, each
    with the parameters and two moments in float32.
    """
    readers, done = _readers(stages), set[str]()
    held, peak, saved = dict[str, int](), 0, 0
    for stage in stages:
        written = 3 * checkpoints * stage.model_bytes if stage.command == "train" else 0
        held[stage.key] = stage.model_bytes
        peak = max(peak, saved + sum(held.values()) + written)
        saved += written if keep_models == "all" else 0
        done.add(stage.key)
        if keep_models == "none":
            held = {key: size for key, size in held.items() if not readers[key] <= done}
    return peak


def _readers(stages: Iterable[Stage]) -> dict[str, set[str]]:
    """Return the keys of the readers of each stage."""
    found: dict[str, set[str]] = {}
    for stage in stages:
        found.setdefault(stage.key, set())
        for one in stage.dependencies:
            found.setdefault(one.key, set()).add(stage.key)
    return found


def _lease_file(root: Path, stage: Stage) -> Path:
    return root / f".{stage.name}.lease"


def _is_removed(root: Path, stage: Stage) -> bool:
    """Return True if the model of a finished stage was removed."""
    return bool(stage.model_bytes) and "removed" in json_files.read_json(root / f"{stage.name}.json")


def _remove_weights(root: Path, stage: Stage, *, all_weights: bool) -> None:
    """Remove the checkpoints of a finished stage, and its model with `all_weights`."""
    with lease(_lease_file(root, stage)) as is_acquired:
        if not is_acquired or not is_done(root, stage) or _is_removed(root, stage):
            return  # another process removes it or makes it again
        atomic.remove_folder(root / stage.name / "checkpoints")
        if all_weights:
            path = root / f"{stage.name}.json"
            json_files.write_json(path, {**json_files.read_json(path), "removed": True})
            atomic.remove_folder(root / stage.name / "model")


def _make_removed_again(root: Path, reader: Stage) -> None:
    """Make the removed models that a stage reads."""
    for stage in reader.dependencies:
        while broadcast_one_to_all(partial(_is_removed, root, stage)):
            _make_removed_again(root, stage)
            with ExitStack() as claim:
                if broadcast_one_to_all(partial(claim.enter_context, lease(_lease_file(root, stage)))):
                    _run(root, stage)
                else:
                    time.sleep(0.5)  # another process makes it
