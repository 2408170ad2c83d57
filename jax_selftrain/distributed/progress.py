"""Progress of a command: bars on a terminal, else log lines.

Process 0 shows it.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import jax

LOG_INTERVAL = 30.0
"""Seconds between two lines about one bar."""
_logger = logging.getLogger("jax_selftrain")


def log_line(text: str) -> None:
    """Log a line on process 0.

    The logger is `jax_selftrain`, at INFO; commands write it to standard error.
    """
    if not jax.process_index():
        _logger.info(text)


@contextmanager
def progress_bar(
    label: str, total: int, completed: int = 0, *, transient: bool = True
) -> Iterator[Callable[[int, str], None]]:
    """Yield a function that shows the number completed and a text.

    Without a terminal, it logs them every `LOG_INTERVAL` seconds.
    """
    if jax.process_index():
        yield lambda completed, text: None
        return
    if not sys.stderr.isatty():
        yield _log_every_interval(label, total, completed)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(label), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}")
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=transient) as bar:
        task = bar.add_task(label, total=total, completed=completed, text="compiling")
        yield lambda completed, text: bar.update(task, completed=completed, text=text)


def _log_every_interval(label: str, total: int, first: int) -> Callable[[int, str], None]:
    began = logged = time.monotonic()

    def show(completed: int, text: str) -> None:
        nonlocal logged
        now = time.monotonic()
        if now - logged < LOG_INTERVAL:
            return
        logged = now
        parts = [f"{label}: {completed:,} of {total:,}", text.strip()]
        if completed > first:
            left = timedelta(seconds=round((now - began) / (completed - first) * (total - completed)))
            parts.append(f"{left} left")
        log_line(", ".join(filter(None, parts)))

    return show
