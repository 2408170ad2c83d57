"""Records of a training run: metrics, evaluations, timings.

`metrics.jsonl` and `curve.jsonl` are functions of the run's inputs, so that an interrupted and an uninterrupted run are
equal byte for byte. Wall-clock times are in `timings.jsonl`. TensorBoard, and W&B if requested, receive all of
them. Only process 0 writes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import jax

from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.io.import_guard import block_torch_import
from jax_selftrain.training.flops import Throughput
from jax_selftrain.training.wandb_tracker import WandbTracker
from jax_selftrain.version import versions

METRICS = ("loss", "grad_norm", "learning_rate", "tokens")
"""Fields of `metrics.jsonl`: nats per target, gradient norm before clipping, learning rate, number of targets."""

NO_STEP = -1
"""Value of `last_step` for a run without records."""


class MetricsWriter:
    """Metrics, evaluations, timings, TensorBoard and progress bar of a run folder."""

    def __init__(
        self,
        run: Path,
        *,
        last_step: int,
        steps: int,
        log_every: int,
        throughput: Throughput,
        tracker: WandbTracker | None = None,
    ):
        """Open the files and drop records after `last_step`.

        Args:
          run: run folder.
          last_step: step of the restored checkpoint, or NO_STEP.
          steps: number of steps of the run.
          log_every: number of steps between records.
          throughput: conversion of tokens per second to FLOP/s.
          tracker: W&B run, closed with this writer.
        """
        with block_torch_import():
            from tensorboardX import SummaryWriter

        self._path, self._steps, self._log_every = run / "metrics.jsonl", steps, log_every
        self._curve_path = run / "curve.jsonl"
        self._curve: IO[str] | None = None
        _truncate(self._path, last_step)
        _truncate(self._curve_path, last_step)
        self._metrics = _open_to_append(self._path)
        self._timings = _open_to_append(run / "timings.jsonl")
        self._tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=last_step + 1)
        self._tracker, self._throughput = tracker, throughput
        self._progress = _ProgressBar(max(0, last_step), steps) if sys.stderr.isatty() else None
        self._since, self._tokens = time.perf_counter(), 0

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of every `log_every`-th step and of the last."""
        self._tokens += int(metrics["tokens"])
        if self._progress is not None:
            self._progress.update(step, metrics["loss"])
        if step % self._log_every and step != self._steps:
            return
        now = time.perf_counter()
        rate = self._tokens / (now - self._since)
        speed = {"tokens_per_second": rate, **self._throughput.flops_and_mfu(rate)}
        timing = {"step": step, "time": time.time(), "seconds": now - self._since, **speed}
        self._since, self._tokens = now, 0
        _append(self._metrics, {"step": step, **{name: metrics[name] for name in METRICS}})
        _append(self._timings, timing)
        if self._progress is not None:
            self._progress.show_speed(speed)
        self._log(step, {**metrics, **speed})

    def write_eval(self, step: int, metrics: Mapping[str, float], *, seconds: float) -> None:
        """Record an evaluation; its `seconds` do not count as training time."""
        self._since += seconds
        if self._curve is None:
            self._curve = _open_to_append(self._curve_path)
        _append(self._curve, {"step": step, **metrics})
        self._log(step, metrics)

    def sync(self) -> None:
        """Flush all records to disk, before a checkpoint that implies them."""
        try:
            for file in self._files():
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _write_error(self._path, error) from error
        self._tensorboard.flush()

    def close(self) -> None:
        """Flush and close all files."""
        if self._progress is not None:
            self._progress.close()
        self._tensorboard.close()
        if self._tracker is not None:
            self._tracker.close()
        try:
            for file in self._files():
                file.close()
        except OSError as error:
            raise _write_error(self._path, error) from error

    def _files(self) -> list[IO[str]]:
        return [self._metrics, self._timings, *([] if self._curve is None else [self._curve])]

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.log(step, values)


@contextmanager
def open_metrics_writer(make: Callable[[], MetricsWriter]) -> Iterator[MetricsWriter | None]:
    """Open the writer on process 0; yield None on the others."""
    if jax.process_index():
        yield None
        return
    writer = make()
    try:
        yield writer
    finally:
        writer.close()


def write_launch_info(run: Path, facts: Mapping[str, Any]) -> None:
    """Append the time, the facts and the versions to `launches.jsonl`."""
    line = {"time": time.time(), **facts, "versions": versions(), "xla_flags": os.environ.get("XLA_FLAGS", "")}
    with _open_to_append(run / "launches.jsonl") as file:
        file.write(json.dumps(line, sort_keys=True) + "\n")


class _ProgressBar:
    """Progress bar with the latest loss, on standard error."""

    def __init__(self, step: int, steps: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("training", total=steps, completed=step, loss="…", speed="")
        self._progress.start()

    def update(self, step: int, loss: float) -> None:
        self._progress.update(self._task, completed=step, loss=f"{loss:.4f}")

    def show_speed(self, speed: Mapping[str, float]) -> None:
        text = f"{speed['tokens_per_second']:,.0f} tokens/s, {speed['flops_per_second'] / 1e12:.3g} TFLOP/s"
        if "mfu" in speed:
            text += f", MFU {speed['mfu']:.1%}"
        self._progress.update(self._task, speed=text)

    def close(self) -> None:
        self._progress.stop()


def _truncate(path: Path, step: int) -> None:
    """Drop the lines after `step`, which may be incomplete."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            break
    atomic.write_text(path, "".join(kept))


def _open_to_append(path: Path) -> IO[str]:
    try:
        return open(path, "a", buffering=1, encoding="utf-8")  # line-buffered: complete lines survive a kill
    except OSError as error:
        raise _write_error(path, error) from error


def _append(file: IO[str], line: Mapping[str, float]) -> None:
    try:
        file.write(json.dumps(line, allow_nan=False) + "\n")
    except OSError as error:
        raise _write_error(Path(file.name), error) from error


def _write_error(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written ({error.strerror}); correct this and run the same command again")
