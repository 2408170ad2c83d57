"""Checkpoints of a run: `checkpoints/NNNNNN/{model/, optimizer/, step.json}`.

A checkpoint is committed by one rename. `step.json` holds the hashes of two manifests, which hold the hashes of every
file; Orbax by itself restores flipped bytes without an error. It also holds the hashes of the run's logs up to the
step, so that a resumed run continues whole logs. A damaged checkpoint is an error, not skipped: the user decides about
the fallback.

A background thread writes and hashes the host copy of the state. With several processes, saving is collective and stays
in the foreground, since its collectives must not interleave with those of the training step.
"""

import re
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import jax
import numpy as np

from jax_selftrain import hub
from jax_selftrain.config import TrainConfig, yaml_io
from jax_selftrain.config.metadata import Role
from jax_selftrain.errors import InputError
from jax_selftrain.hub import orbax_io
from jax_selftrain.hub.model_folder import commit_from_all_processes
from jax_selftrain.hub.orbax_io import find_nonfinite
from jax_selftrain.io import atomic, json_files
from jax_selftrain.io.jsonl import read_log
from jax_selftrain.io.manifest import manifest_entry, verify_beginning, verify_checksums
from jax_selftrain.training.run_folder import Run
from jax_selftrain.training.step import TrainState, export_params

FORMAT = 2
MANIFESTS = ("model/selftrain.json", "optimizer/manifest.json")
"""Files with the hashes of all others."""

_CORRUPT_HINT = "the checkpoint is damaged"


class Checkpointer:
    """Saves the checkpoints of a run in the background."""

    def __init__(self, run: Run, stack: ExitStack):
        self._run, self._folder = run, run.folder / "checkpoints"
        self._executor = stack.enter_context(ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint"))
        self._pending: Future[None] | None = None
        stack.callback(self.wait)

    def save(self, state: TrainState, logs: Mapping[str, Any]) -> None:
        """Copy the state to the host and save it in the background.

        Args:
          state: the state after a step.
          logs: from `MetricsWriter.sync` after that step.

        Raises:
          InputError: a value of the state is not finite; it is not saved.
          Exception: the error of the previous save, if it failed.
        """
        self.wait()
        step = int(state.step)
        trees = export_params(self._run.config, state), _optimizer_tree(self._run.config, state)
        broken = find_nonfinite(*trees)
        if broken is not None:
            raise InputError(f"{self._folder}: {broken} holds NaN or infinity at step {step}; nothing of it was saved")
        if jax.process_count() > 1:
            self._write(step, logs, *trees)
        else:
            self._pending = self._executor.submit(self._write, step, logs, *map(_copy_to_host, trees))

    def wait(self) -> None:
        """Wait for the latest save; raise its error if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def prune(self) -> None:
        """Delete the checkpoints that are not to keep, on process 0."""
        if jax.process_index():
            return
        config = self._run.config
        folders = {int(folder.name): folder for folder in list_steps(self._folder)}
        kept = steps_to_keep(list(folders), config.keep, config.keep_every)
        if config.best_epoch and (curve := read_curve(self._run.folder)):
            kept.add(best_step(curve))
        for step in folders.keys() - kept:
            atomic.remove_folder(folders[step])

    def _write(self, step: int, logs: Mapping[str, Any], params: Any, rest: dict[str, Any]) -> None:
        with commit_from_all_processes(self._folder / f"{step:06d}") as temporary:
            save_run_model(self._run, temporary / "model", params, step, "flax")
            orbax_io.save_tree(temporary / "optimizer", rest)
            if not jax.process_index():
                hashes = {name: manifest_entry(temporary / name) for name in MANIFESTS}
                record = {"format": FORMAT, "step": step, "run": self._run.run_hash, "manifests": hashes, "logs": logs}
                json_files.write_json(temporary / "step.json", record)
        self.prune()


def save_run_model(run: Run, folder: Path, params: Any, step: int, format: Literal["hf", "flax"]) -> None:
    """Save a model folder; `hf` for the result, `flax` for a checkpoint."""
    metadata: dict[str, Any] = {"made_by": "train", "step": step, "steps": run.config.steps, "run": run.run_hash}
    metadata |= {"fingerprints": run.inputs.fingerprints, "recipe": yaml_io.to_dict(run.config, Role.IDENTITY)}
    names = ("kind", "samples", "tokens", "policy", "seed")
    metadata["corpora"] = {
        str(n): {"fingerprint": corpus.fingerprint, **{name: corpus.manifest.get(name) for name in names}}
        for n, corpus in enumerate(run.inputs.corpora)
    }
    hub.save_model(folder, params, source=run.inputs.source, metadata=metadata, format=format)


def steps_to_keep(steps: Sequence[int], keep: int, keep_every: int | None = None) -> set[int]:
    """Return the steps to keep: the latest `keep` and every `keep_every`-th."""
    latest = set(sorted(steps)[-keep:])
    return {step for step in steps if step in latest or (keep_every and step and step % keep_every == 0)}


def best_step(curve: Sequence[Mapping[str, float]]) -> int:
    """Return the first step with the highest mean accuracy after an epoch."""
    accuracy = {
        int(line["step"]): fmean(value for name, value in line.items() if name.endswith("/acc")) for line in curve
    }
    return max((step for step in accuracy if step), key=lambda step: (accuracy[step], -step), default=0)


def read_curve(run: Path) -> list[dict[str, float]]:
    """Read `curve.jsonl` of a run; empty without one."""
    return read_log(run / "curve.jsonl")


def restore(folder: Path, run: Run, abstract: TrainState) -> TrainState:
    """Restore the state, without `frozen_base`, and verify every byte.

    Args:
      folder: from `latest_step`.
      run: its sharding may differ from that of the save.
      abstract: shapes and shardings of the state (`step.abstract_state`).

    Raises:
      InputError: a file is missing, truncated, changed, or of another run; says what to delete.
    """
    try:
        continued = json_files.read_json(run.folder / "run.json").get("continues", ())
        record = _read_record(folder, {run.run_hash, *continued})
        for name, entry in record.get("logs", {}).items():
            verify_beginning(run.folder / name, entry, fix_hint="restore it from a copy")
        model = hub.load_model(folder / "model", run.inputs.sharding_rules.mesh, "float32", preset=run.config.preset)
        rest = orbax_io.load_tree(folder / "optimizer", _optimizer_tree(run.config, abstract), remedy=_CORRUPT_HINT)
    except InputError as error:
        earlier = [other for other in list_steps(folder.parent) if other < folder]
        fallback = f"step {int(earlier[-1].name)}" if earlier else "the start, as no other checkpoint is left"
        remedy = f"delete {folder} and run the same command again"
        raise InputError(f"{error}; to fall back to {fallback}, {remedy}") from error
    if int(rest["step"]) != record["step"]:
        raise InputError(f"{folder}: its optimizer is of step {int(rest['step'])}; delete {folder} and run again")
    return TrainState(rest["step"], rest.get("params", model.params), rest["optimizer"])


def latest_step(run: Path) -> Path | None:
    """Return the latest checkpoint of a run, or None."""
    folders = list_steps(run / "checkpoints")
    return folders[-1] if folders else None


def list_steps(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, by step."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in paths if re.fullmatch(r"\d{6,}", path.name)), key=lambda path: int(path.name))


def _copy_to_host(tree: Any) -> Any:
    """Copy a tree to NumPy arrays.

    On a CPU `device_get` may return views of the device buffers, which the next step donates.
    """
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), jax.device_get(tree))


def _optimizer_tree(config: TrainConfig, state: TrainState) -> dict[str, Any]:
    """Return the part of the state that a checkpoint stores outside `model/`."""
    tree: dict[str, Any] = {"step": state.step, "optimizer": state.opt_state}
    return tree | {"params": state.params} if config.lora_rank else tree


def _read_record(folder: Path, run_hashes: Set[str]) -> dict[str, Any]:
    content: dict[str, Any] = json_files.read_json(folder / "step.json")
    if not isinstance(content, dict) or content.get("format") != FORMAT or "run" not in content:
        raise InputError(f"{folder / 'step.json'}: is not the record of a checkpoint of format {FORMAT}")
    if content["run"] not in run_hashes:
        raise InputError(f"{folder}: this checkpoint was made by another run")
    verify_checksums(folder, content["manifests"], fix_hint=_CORRUPT_HINT)
    return content
