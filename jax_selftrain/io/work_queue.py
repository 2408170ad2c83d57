"""Work queue: processes claim missing tasks by lease, run them, or wait.

A task is done when its committed output exists, so there is no queue to keep: a restart runs only missing tasks, and a
lost process costs its unfinished tasks, whose leases the others take over (`io.lease`).
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TypeVar

from jax_selftrain.io.lease import lease

Task = TypeVar("Task")


def run_missing(
    tasks: Iterable[Task],
    run_claimed: Callable[[Iterator[tuple[Task, ExitStack]]], None],
    *,
    is_done: Callable[[Task], bool],
    lease_file: Callable[[Task], Path],
    is_ready: Callable[[Task], bool] = lambda _: True,
    agree: Callable[[Callable[[], bool]], bool] = lambda decide: decide(),
    on_done: Callable[[Task], None] = lambda _: None,
    poll_seconds: float = 0.5,
    on_wait: Callable[[], None] = lambda: None,
    progress: Callable[[Sequence[Task]], Iterable[Task]] = iter,
) -> None:
    """Run the missing tasks, shared with other processes, until all are done.

    Args:
      tasks: the tasks, in the order in which they are tried; the same in every process.
      run_claimed: run the tasks of an iterator, which claims the next task when it is advanced and yields it with its
        claim, a context manager. On return every claimed task must be done. Other claims end then, or with its
        exception.
      is_done: return True if the output of a task is committed.
      lease_file: return the path of a task's lease; its folder must exist.
      is_ready: return True if a task can run now.
      agree: evaluate a decision once for all processes that run every task together, as `broadcast_one_to_all` does.
      on_done: called in every process when a task is found done.
      poll_seconds: pause when other processes hold all tasks that are ready.
      on_wait: called before each pause; it may raise to stop.
      progress: wrap the tasks of a pass, for instance in a progress bar.
    """

    def run_pass(pending: list[Task]) -> list[Task]:
        remaining: list[Task] = []
        is_idle = True

        def claim_tasks(claims: ExitStack) -> Iterator[tuple[Task, ExitStack]]:
            nonlocal is_idle
            for task in progress(pending):
                if not is_ready(task):
                    remaining.append(task)
                elif agree(partial(is_done, task)):
                    is_idle = False
                    on_done(task)
                else:
                    remaining.append(task)  # the next pass sees that it is done
                    with ExitStack() as attempt:
                        if agree(partial(try_claim, task, attempt)):
                            is_idle = False
                            yield task, claims.enter_context(attempt.pop_all())

        with ExitStack() as claims:
            run_claimed(claim_tasks(claims))
        if is_idle:
            on_wait()
            time.sleep(poll_seconds)
        return remaining

    def try_claim(task: Task, attempt: ExitStack) -> bool:
        # Another process may have finished the task since the look at it.
        return attempt.enter_context(lease(lease_file(task))) and not is_done(task)

    def remove_stale_lease(task: Task) -> bool:
        if lease_file(task).exists():  # a process was killed after its task was done
            with lease(lease_file(task)):
                pass
        return True

    tasks = list(tasks)
    pending = tasks
    while pending:
        pending = run_pass(pending)
    for task in tasks:
        agree(partial(remove_stale_lease, task))
