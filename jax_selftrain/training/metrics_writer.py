"""What a run writes about itself while it trains.

`metrics.jsonl` holds only what is determined by the run's inputs, so that an interrupted and an undisturbed run can be
compared byte for byte; so does `curve.jsonl`, which holds what was measured on the way; wall-clock stands apart in
`timings.jsonl`. TensorBoard (and W&B, if asked for) gets all of it. Only process 0 writes.
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
"""In place of the last step whose records stand: not even what is measured before the first step."""


class MetricsWriter:
    """Metrics, curve, timings, TensorBoard and progress bar of one run folder."""

    def __init__(
        self,
        run: Path,
        *,
        done: int,
        steps: int,
        log_every: int,
        speed: Throughput,
        tracker: WandbTracker | None = None,
    ):
        """Open for a run of `steps` steps.

        Args:
          run: its folder.
          done: the step that it goes on from, or NOTHING_DONE; what an earlier attempt recorded of later steps is
            dropped.
          steps: how many steps there are in all.
          log_every: write every so many of them.
          speed: turns tokens per second into FLOP/s.
          tracker: W&B, closed with these records.
        """
        with block_torch_import():
            from tensorboardX import SummaryWriter

        self._path, self._steps, self._log_every = run / "metrics.jsonl", steps, log_every
        self._curve_path = run / "curve.jsonl"
        self._curve: IO[str] | None = None
        _truncate(self._path, done)
        _truncate(self._curve_path, done)
        self._metrics = _append_to(self._path)
        self._timings = _append_to(run / "timings.jsonl")
        self._tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=done + 1)
        self._tracker, self._speed = tracker, speed
        self._progress = _progress_bar(max(0, done), steps)
        self._since, self._tokens = time.perf_counter(), 0

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a finished step; of the steps between every `log_every`-th only the time is kept."""
        self._tokens += int(metrics["tokens"])
        if self._progress is not None:
            self._progress.update(step, metrics["loss"])
        if step % self._log_every and step != self._steps:
            return
        now = time.perf_counter()
        rate = self._tokens / (now - self._since)
        speed = {"tokens_per_second": rate, **self._speed.flops_and_mfu(rate)}
        timing = {"step": step, "time": time.time(), "seconds": now - self._since, **speed}
        self._since, self._tokens = now, 0
        line = {"step": step, **{name: metrics[name] for name in METRICS}}
        self._append(self._metrics, line)
        self._append(self._timings, timing)
        if self._progress is not None:
            self._progress.show_speed(speed)
        self._show(step, {**metrics, **speed})

    def write_eval(self, step: int, measures: Mapping[str, float], *, seconds: float) -> None:
        """Record what was measured after `step` updates; the `seconds` that took do not count as training."""
        self._since += seconds
        if self._curve is None:
            self._curve = _append_to(self._curve_path)
        self._append(self._curve, {"step": step, **measures})
        self._show(step, measures)

    def sync(self) -> None:
        """Have what was written so far on the disk: called before a checkpoint that would vouch for it."""
        try:
            for file in self._files():
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unwritable(self._path, error) from error
        self._tensorboard.flush()

    def close(self) -> None:
        """Flush and close everything."""
        if self._progress is not None:
            self._progress.close()
        self._tensorboard.close()
        if self._tracker is not None:
            self._tracker.close()
        try:
            for file in self._files():
                file.close()
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def _files(self) -> list[IO[str]]:
        return [self._metrics, self._timings, *([] if self._curve is None else [self._curve])]

    def _append(self, file: IO[str], line: Mapping[str, float]) -> None:
        try:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise _unwritable(Path(file.name), error) from error

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.log(step, values)


@contextmanager
def open_metrics_writer(make: Callable[[], MetricsWriter]) -> Iterator[MetricsWriter | None]:
    """What `make` returns on process 0, None on the others."""
    if jax.process_index():
        yield None
        return
    records = make()
    try:
        yield records
    finally:
        records.close()


def write_launch_info(run: Path, facts: Mapping[str, Any]) -> None:
    """Add a line to `launches.jsonl`: when, where and from which step a run was started or resumed."""
    line = {"time": time.time(), **facts, "versions": versions(), "xla_flags": os.environ.get("XLA_FLAGS", "")}
    with _append_to(run / "launches.jsonl") as file:
        file.write(json.dumps(line, sort_keys=True) + "\n")


class _Progress:
    """A bar with the latest loss, on standard error."""

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
        shown = f"{speed['tokens_per_second']:,.0f} tokens/s, {speed['flops_per_second'] / 1e12:.3g} TFLOP/s"
        if "mfu" in speed:
            shown += f", MFU {speed['mfu']:.1%}"
        self._progress.update(self._task, speed=shown)

    def close(self) -> None:
        self._progress.stop()


def _progress_bar(step: int, steps: int) -> _Progress | None:
    return _Progress(step, steps) if sys.stderr.isatty() else None


def _truncate(path: Path, step: int) -> None:
    """Keep the lines of steps up to `step`. A line that a kill cut short is always a later one: see `sync`."""
    if path.exists():
        atomic.write_text(path, "".join(text + "\n" for text in _lines(path, step)))


def _lines(path: Path, step: int) -> Iterator[str]:
    """Yield the complete lines of steps up to `step`."""
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            wanted = json.loads(text)["step"] <= step
        except (ValueError, KeyError, TypeError):
            return
        if wanted:
            yield text


def _append_to(path: Path) -> IO[str]:
    try:
        return open(path, "a", buffering=1, encoding="utf-8")  # a line at a time: what is logged survives a kill
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written ({error.strerror}); mend this and run the same command again")
