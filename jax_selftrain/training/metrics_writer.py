"""Records of a training run: metrics, evaluations, timings, launches.

`metrics.jsonl` and `curve.jsonl` are functions of the run's inputs, so that an interrupted and an uninterrupted run are
equal byte for byte. Wall-clock times are in `timings.jsonl`, and `launches.jsonl` has a line for each launch.
TensorBoard, and W&B if requested (`--wandb PROJECT`), receive metrics and timings. Only process 0 writes.
"""

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import jax

from jax_selftrain.config import yaml_io
from jax_selftrain.config.metadata import Role
from jax_selftrain.distributed.progress import log_line, progress_bar
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.io.import_guard import block_torch_import
from jax_selftrain.io.jsonl import log_entry, read_log
from jax_selftrain.io.manifest import manifest_entry
from jax_selftrain.models import count_params
from jax_selftrain.training.flops import measure_speed
from jax_selftrain.training.run_folder import Run
from jax_selftrain.version import versions

METRICS = ("loss", "grad_norm", "learning_rate", "tokens")
"""Fields of `metrics.jsonl`: nats per target, gradient norm before clipping, learning rate, number of targets."""

LOGS = ("metrics.jsonl", "curve.jsonl")

NO_STEP = -1
"""Value of `last_step` for a run without records."""


class MetricsWriter:
    """Records, TensorBoard, W&B and progress bar of a run."""

    def __init__(self, run: Run, last_step: int, stack: ExitStack):
        with block_torch_import():
            from tensorboardX import SummaryWriter

        self._run, self._files = run, dict[str, IO[str]]()
        stack.callback(self._close)
        for name in LOGS:
            _truncate(run.folder / name, last_step)
        self._tensorboard = SummaryWriter(str(run.folder / "tensorboard"), purge_step=last_step + 1)
        stack.callback(self._tensorboard.close)
        self._wandb = _start_wandb(run) if run.config.wandb else None
        if self._wandb is not None:
            stack.callback(self._wandb.finish)
        first, mesh = max(0, last_step), run.inputs.sharding_rules.mesh
        self._show = stack.enter_context(progress_bar("training", run.config.steps or 1, first, transient=False))
        launch = {
            "device": mesh.devices.flat[0].device_kind,
            "from_step": first,
            "mesh": dict(mesh.shape),
            "options": yaml_io.to_dict(run.config, Role.EXECUTION),
            "processes": jax.process_count(),
            "time": time.time(),
            "versions": versions(),
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
        }
        self._append("launches.jsonl", launch)
        config, model = run.config, run.inputs.source
        log_line(
            f"training {model.ref} ({count_params(model.config):,} parameters), steps {first:,} to {config.steps:,} of "
            f"{config.batch_size} rows of {config.seq_len} tokens, on {mesh.size} × {launch['device']}"
        )
        self._since, self._tokens, self._speed = time.perf_counter(), 0, ""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of every `log_every`-th step and of the last."""
        config = self._run.config
        self._tokens += int(metrics["tokens"])
        if step % config.log_every == 0 or step == config.steps:
            now = time.perf_counter()
            seconds, self._since = now - self._since, now
            model, mesh = self._run.inputs.source.config, self._run.inputs.sharding_rules.mesh
            speed = measure_speed(config, model, mesh, self._tokens / seconds)
            self._tokens = 0
            self._append("metrics.jsonl", {"step": step, **{name: metrics[name] for name in METRICS}})
            self._append("timings.jsonl", {"step": step, "time": time.time(), "seconds": seconds, **speed})
            self._log(step, {**metrics, **speed})
            self._speed = f"{speed['tokens_per_second']:,.0f} tokens/s, {speed['flops_per_second'] / 1e12:.3g} TFLOP/s"
            if "mfu" in speed:
                self._speed += f", MFU {speed['mfu']:.1%}"
        self._show(step, f"loss {metrics['loss']:.4f} {self._speed}")

    def write_eval(self, step: int, metrics: Mapping[str, float], *, seconds: float) -> None:
        """Record an evaluation; its `seconds` do not count as training time."""
        self._since += seconds
        self._append("curve.jsonl", {"step": step, **metrics})
        self._log(step, metrics)

    def sync(self) -> dict[str, dict[str, Any]]:
        """Flush all records to disk, before a checkpoint that implies them.

        Returns checksum and size of each log that a resumed run continues.
        """
        for name, file in self._files.items():
            with atomic.os_errors_as_input_errors(self._run.folder / name):
                file.flush()
                os.fsync(file.fileno())
        self._tensorboard.flush()
        paths = [self._run.folder / name for name in LOGS]
        return {path.name: manifest_entry(path) for path in paths if path.exists()}

    def _close(self) -> None:
        for name, file in self._files.items():
            with atomic.os_errors_as_input_errors(self._run.folder / name):
                file.close()

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        path = self._run.folder / name
        with atomic.os_errors_as_input_errors(path):
            if name not in self._files:  # line-buffered: complete lines survive a kill
                self._files[name] = path.open("a", buffering=1, encoding="utf-8")
            self._files[name].write(log_entry(line))

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)


def _truncate(path: Path, step: int) -> None:
    """Drop the lines after `step`, and an incomplete line."""
    if path.exists():
        rows = [] if step == NO_STEP else read_log(path)
        if not all(isinstance(row.get("step"), int) for row in rows):
            raise InputError(f"{path}: has a line without a step, so it is another file; restore it from a copy")
        atomic.write_text(path, "".join(log_entry(row) for row in rows if row["step"] <= step))


def import_wandb() -> Any:
    """Import Weights & Biases, or raise InputError."""
    try:
        return import_module("wandb")
    except ImportError as error:
        raise InputError("--wandb needs the package wandb: pip install wandb") from error


def _start_wandb(run: Run) -> Any:
    """Start or resume the W&B run with the id of this run.

    W&B accepts each step once and in order, so that repeated steps of a resumed run are not logged twice.
    """
    wandb, config = import_wandb(), run.config
    name, folder = run.folder.name, str(run.folder)
    options = yaml_io.to_dict(config)
    try:
        return wandb.init(
            project=config.wandb, id=run.run_hash[:32], resume="allow", name=name, dir=folder, config=options
        )
    except wandb.Error as error:
        raise InputError(f"--wandb {config.wandb}: {error}; correct this, or omit the option") from error
