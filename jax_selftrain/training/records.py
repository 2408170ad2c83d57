"""What a run writes about itself while it trains.

`metrics.jsonl` holds only what is determined by the run's inputs, so that an interrupted and an undisturbed run can be
compared byte for byte; wall-clock stands apart in `timings.jsonl`. TensorBoard gets both. Only process 0 writes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import jax

from jax_selftrain import storage
from jax_selftrain.errors import InputError

METRICS = ("loss", "grad_norm", "learning_rate", "tokens")
"""What `metrics.jsonl` says of a step: nats per target, gradient norm before clipping, rate used, number of targets."""


class RunRecords:
    """Metrics, timings, TensorBoard and progress bar of one run folder."""

    def __init__(self, run: Path, *, step: int, steps: int, log_every: int):
        """Open for a run of `steps` steps of which `step` are done; later lines of an earlier attempt are dropped."""
        from tensorboardX import SummaryWriter

        self._path, self._steps, self._log_every = run / "metrics.jsonl", steps, log_every
        _truncate(self._path, step)
        self._metrics = _append_to(self._path)
        self._timings = _append_to(run / "timings.jsonl")
        self._tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self._progress = _progress_bar(step, steps)
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
        timing = {"step": step, "time": time.time(), "seconds": now - self._since, "tokens_per_second": rate}
        self._since, self._tokens = now, 0
        try:
            line = {"step": step, **{name: metrics[name] for name in METRICS}}
            self._metrics.write(json.dumps(line, allow_nan=False) + "\n")
            self._timings.write(json.dumps(timing) + "\n")
        except OSError as error:
            raise _unwritable(self._path, error) from error
        for name, value in {**metrics, "tokens_per_second": rate}.items():
            self._tensorboard.add_scalar(name, value, step)

    def sync(self) -> None:
        """Have what was written so far on the disk: called before a checkpoint that would vouch for it."""
        try:
            for file in (self._metrics, self._timings):
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
        try:
            self._metrics.close()
            self._timings.close()
        except OSError as error:
            raise _unwritable(self._path, error) from error


@contextmanager
def open_records(run: Path, *, step: int, steps: int, log_every: int) -> Iterator[RunRecords | None]:
    """`RunRecords` on process 0, None on the others."""
    if jax.process_index():
        yield None
        return
    records = RunRecords(run, step=step, steps=steps, log_every=log_every)
    try:
        yield records
    finally:
        records.close()


def record_launch(run: Path, facts: Mapping[str, Any]) -> None:
    """Add a line to `launches.jsonl`: when, where and from which step a run was started or resumed."""
    line = {"time": time.time(), **facts, "versions": storage.versions(), "xla_flags": os.environ.get("XLA_FLAGS", "")}
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
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("training", total=steps, completed=step, loss="…")
        self._progress.start()

    def update(self, step: int, loss: float) -> None:
        self._progress.update(self._task, completed=step, loss=f"{loss:.4f}")

    def close(self) -> None:
        self._progress.stop()


def _progress_bar(step: int, steps: int) -> _Progress | None:
    return _Progress(step, steps) if sys.stderr.isatty() else None


def _truncate(path: Path, step: int) -> None:
    """Keep the lines of steps up to `step`. A line that a kill cut short is always a later one: see `sync`."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            break
    storage.write_text(path, "".join(kept))


def _append_to(path: Path) -> IO[str]:
    try:
        return open(path, "a", buffering=1, encoding="utf-8")  # a line at a time: what is logged survives a kill
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written ({error.strerror}); mend this and run the same command again")
