"""Checkpoints of a run: `checkpoints/NNNNNN/{model/, optimizer/, step.json}`, each committed whole by one rename.

`model/` is a model folder like any other, so every checkpoint can be scored, sampled from or exported. `step.json`
holds the data position and the digests of the two manifests, which in turn hold the digests of every file: one chain
from one small file to every byte (Orbax by itself restored a flipped byte without a word).

Saving blocks only for the copy from device to host; writing, hashing and renaming happen on a background thread, one
save at a time. What goes wrong there is raised by the next save or at the end of the run, never dropped. Several
processes write together and in the foreground: their saving is collective, and collectives of a second thread would
interleave with those of the training step.

Most checkpoints are temporary: only the latest `keep` stay. Those of every `keep_every`-th step are permanent.

A damaged checkpoint is refused by name, not skipped: whether to fall back to the one before is for a person to decide,
since it may cost hours and the damage says something about the disk.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from jax_selftrain import hub
from jax_selftrain.config import TrainConfig
from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.errors import InputError
from jax_selftrain.hub import orbax_io
from jax_selftrain.hub.model_folder import commit_from_all_processes
from jax_selftrain.hub.orbax_io import find_nonfinite
from jax_selftrain.io import atomic
from jax_selftrain.io.manifest import hash_json, sha256_file, verify_checksums
from jax_selftrain.models import Params
from jax_selftrain.training.step import TrainState, export_params

FORMAT = 2
MANIFESTS = ("model/selftrain.json", "optimizer/manifest.json")
"""Files of a checkpoint that vouch for all others."""

SaveModel = Callable[[Path, Any, int], None]
"""Writes the parameters of a step as a model folder: (folder, host or device arrays, step)."""


class Checkpointer:
    """Writes the checkpoints of one run, in the background; use as a context manager."""

    def __init__(self, run: Path, *, config: TrainConfig, save_model: SaveModel, identity: str):
        """Save under `run/checkpoints`; `identity` is the run's fingerprint."""
        self._config, self._save_model, self._identity = config, save_model, identity
        self._steps = run / "checkpoints"
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, state: TrainState) -> None:
        """Copy the state to the host and write it in the background, after the previous save.

        Raises:
          InputError: a value of the state is not finite: such a state is never saved.
          Exception: the error of the previous save, if it failed.
        """
        self.wait()
        step = int(state.step)
        model, rest = export_params(self._config, state), _optimizer_tree(self._config, state)
        broken = find_nonfinite(model, rest)
        if broken is not None:
            raise InputError(
                f"{self._steps}: {broken} holds NaN or infinity after step {step}; nothing of it was saved"
            )
        if jax.process_count() > 1:
            self._write(step, model, rest)
        else:
            self._pending = self._executor.submit(self._write, step, _to_host(model), _to_host(rest))

    def wait(self) -> None:
        """Return when the latest save is whole on disk; raises what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.wait()  # also when leaving by an error: the save under way is good, and its failure must be heard
        finally:
            self._executor.shutdown()

    def prune(self) -> None:
        """Delete the checkpoints that `steps_to_keep` does not keep, on process 0."""
        if jax.process_index():
            return
        folders = {int(folder.name): folder for folder in list_steps(self._steps)}
        for step in folders.keys() - steps_to_keep(list(folders), self._config.keep, self._config.keep_every):
            _delete(folders[step])

    def _write(self, step: int, model: Params, rest: dict[str, Any]) -> None:
        with commit_from_all_processes(step_dir(self._steps, step)) as aside:
            self._save_model(aside / "model", model, step)
            orbax_io.save_tree(aside / "optimizer", rest)
            if not jax.process_index():
                self._write_record(aside, step)
        self.prune()

    def _write_record(self, folder: Path, step: int) -> None:
        record = {
            "format": FORMAT,
            "step": step,
            "batches": step,
            "run": self._identity,
            "manifests": {name: _entry(folder / name) for name in MANIFESTS},
        }
        atomic.write_json(folder / "step.json", {**record, "fingerprint": hash_json(record)})


def steps_to_keep(steps: Sequence[int], keep: int, keep_every: int | None = None) -> set[int]:
    """Return the saved steps that stay: the latest `keep` and every `keep_every`-th."""
    latest = set(sorted(steps)[-keep:])
    return {step for step in steps if step in latest or (keep_every and step and step % keep_every == 0)}


def restore(
    folder: Path, *, rules: ShardingRules, config: TrainConfig, abstract: TrainState, identity: str
) -> TrainState:
    """Read a checkpoint onto the mesh, verifying every byte; all but the base, which it does not hold.

    Args:
      folder: from `newest`.
      rules: where the parameters go; may differ from that which wrote it.
      config: the run's options.
      abstract: shapes and shardings of the state (`step.abstract_state`).
      identity: fingerprint of what the run is.

    Raises:
      InputError: something in it is missing, truncated, changed, or of another run; says what to delete.
    """
    try:
        record = _read_record(folder, identity)
        model = hub.load_model(folder / "model", rules.mesh, "float32", preset=config.preset)
        rest = orbax_io.load_tree(folder / "optimizer", _optimizer_tree(config, abstract), remedy=_CORRUPT_HINT)
    except InputError as error:
        earlier = [other for other in list_steps(folder.parent) if other < folder]
        back = f"step {int(earlier[-1].name)}" if earlier else "the start, as no other checkpoint is left"
        raise InputError(f"{error}; to fall back to {back}, delete {folder} and run the same command again") from error
    if int(rest["step"]) != record["step"]:
        raise InputError(f"{folder}: its optimizer is of step {int(rest['step'])}; delete {folder} and run again")
    params = rest.get("params", model.params)
    return TrainState(step=rest["step"], params=params, opt_state=rest["optimizer"])


def latest_step(run: Path) -> Path | None:
    """The latest checkpoint of a run, or None."""
    folders = list_steps(run / "checkpoints")
    return folders[-1] if folders else None


def list_steps(steps: Path) -> list[Path]:
    """All checkpoints, in order of their steps. What stands under such a name was committed whole."""
    folders = steps.iterdir() if steps.is_dir() else ()
    return sorted((f for f in folders if re.fullmatch(r"\d{6,}", f.name)), key=lambda f: int(f.name))


def step_dir(steps: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return steps / f"{step:06d}"


def remove_partial(run: Path) -> None:
    """Remove what a killed process left half written or half deleted. Only the holder of the run's lease may."""
    atomic.remove_stale_temp_files(run)
    atomic.remove_stale_temp_files(run / "checkpoints")
    for folder in (run / "checkpoints").glob(f"{atomic.TRASH_PREFIX}*"):
        shutil.rmtree(folder)


_CORRUPT_HINT = "the checkpoint is damaged"


def _delete(folder: Path) -> None:
    """Delete a checkpoint such that a kill on the way leaves no folder that looks like one."""
    hidden = folder.with_name(atomic.TRASH_PREFIX + folder.name)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _to_host(tree: Any) -> Any:
    """A copy of the tree as numpy arrays.

    Truly a copy: on a CPU `device_get` may give a view of the device buffer, which the next, donated step reuses.
    """
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), jax.device_get(tree))


def _entry(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


def _optimizer_tree(config: TrainConfig, state: TrainState) -> dict[str, Any]:
    """Return the part of the state that a checkpoint stores outside `model/`."""
    tree: dict[str, Any] = {"step": state.step, "optimizer": state.opt_state}
    return tree | {"params": state.params} if config.lora_rank else tree


def _read_record(folder: Path, identity: str) -> dict[str, Any]:
    record = atomic.read_json(folder / "step.json")
    content = {key: value for key, value in record.items() if key != "fingerprint"}
    if record.get("fingerprint") != hash_json(content) or content.get("format") != FORMAT:
        raise InputError(f"{folder / 'step.json'}: the file is damaged: it does not match its own fingerprint")
    if content["run"] != identity:
        raise InputError(f"{folder}: this checkpoint was made by another run")
    verify_checksums(folder, content["manifests"], fix_hint=_CORRUPT_HINT)
    return content
