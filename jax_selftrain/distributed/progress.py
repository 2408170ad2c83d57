"""Progress bars on a terminal, shown by process 0."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax


@contextmanager
def progress_bar(
    label: str, total: int, completed: int = 0, *, transient: bool = True
) -> Iterator[Callable[[int, str], None]]:
    """Yield a function that shows the number completed and a text."""
    if jax.process_index() or not sys.stderr.isatty():
        yield lambda completed, text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(label), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}")
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=transient) as bar:
        task = bar.add_task(label, total=total, completed=completed, text="compiling")
        yield lambda completed, text: bar.update(task, completed=completed, text=text)
