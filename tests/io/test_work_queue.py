"""The work queue runs each task once, in any number of processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import jax_selftrain
from jax_selftrain.io.lease import lease
from jax_selftrain.io.work_queue import run_missing

WORKER = """
import sys, time
from pathlib import Path
from jax_selftrain.io import atomic
from jax_selftrain.io.work_queue import run_missing
folder, name, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
def run(claims):
    for task, claim in claims:
        with claim:
            with open(folder / f"log-{name}", "a") as log:
                log.write(f"{task}\\n")
            time.sleep(seconds)
            atomic.write_text(folder / f"{task}.done", name)
run_missing(range(12), run, is_done=lambda task: (folder / f"{task}.done").exists(),
            lease_file=lambda task: folder / f"{task}.lease", poll_seconds=0.02)
"""


def start(folder: Path, name: str, seconds: float) -> subprocess.Popen:
    root = Path(jax_selftrain.__file__).resolve().parents[1]
    command = [sys.executable, "-c", WORKER, str(folder), name, str(seconds)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(root)})


def run_here(folder: Path, tasks: range, **options: object) -> list[int]:
    """Run tasks in this process; return them in order of execution."""
    order: list[int] = []

    def run(claims: Iterator[tuple[int, ExitStack]]) -> None:
        for task, claim in claims:
            with claim:
                order.append(task)
                (folder / f"{task}.done").touch()

    run_missing(
        tasks,
        run,
        is_done=lambda task: (folder / f"{task}.done").exists(),
        lease_file=lambda task: folder / f"{task}.lease",
        poll_seconds=0.01,
        **options,
    )
    return order


def test_only_missing_tasks_run_and_no_lease_is_left(tmp_path):
    (tmp_path / "1.done").touch()
    assert run_here(tmp_path, range(4)) == [0, 2, 3]
    assert run_here(tmp_path, range(4)) == []
    assert not list(tmp_path.glob("*.lease"))


def test_a_task_runs_after_the_tasks_that_it_needs(tmp_path):
    def needs_the_next(task: int) -> bool:
        return task == 3 or (tmp_path / f"{task + 1}.done").exists()

    assert run_here(tmp_path, range(4), is_ready=needs_the_next) == [3, 2, 1, 0]


def test_several_processes_run_each_task_once(tmp_path):
    workers = [start(tmp_path, name, 0.05) for name in "abc"]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0]
    ran = [line for log in tmp_path.glob("log-*") for line in log.read_text().split()]
    assert sorted(map(int, ran)) == list(range(12))
    assert not list(tmp_path.glob("*.lease"))


def test_the_tasks_of_a_killed_process_are_taken_over(tmp_path):
    worker = start(tmp_path, "killed", 60)
    deadline = time.monotonic() + 60
    while not (tmp_path / "log-killed").exists():
        assert worker.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    assert (tmp_path / "0.lease").exists()
    assert run_here(tmp_path, range(12)) == list(range(12))
    assert not list(tmp_path.glob("*.lease"))


def test_a_process_waits_for_tasks_that_others_hold_and_can_be_stopped(tmp_path):
    def stop() -> None:
        raise KeyboardInterrupt

    with lease(tmp_path / "1.lease"):
        with pytest.raises(KeyboardInterrupt):
            run_here(tmp_path, range(3), on_wait=stop)
        assert sorted(path.name for path in tmp_path.glob("*.done")) == ["0.done", "2.done"]
    assert run_here(tmp_path, range(3)) == [1]


def test_a_failing_task_releases_its_lease(tmp_path):
    def fail(claims: Iterator[tuple[int, ExitStack]]) -> None:
        for _ in claims:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_missing([0], fail, is_done=lambda _: False, lease_file=lambda task: tmp_path / f"{task}.lease")
    assert not list(tmp_path.iterdir())


def test_claims_may_be_held_until_later_tasks_are_claimed(tmp_path):
    def run_at_once(claims: Iterator[tuple[int, ExitStack]]) -> None:
        held = list(claims)
        assert len(list(tmp_path.glob("*.lease"))) == len(held)
        for task, claim in held:
            with claim:
                (tmp_path / f"{task}.done").touch()

    run_missing(
        range(5),
        run_at_once,
        is_done=lambda task: (tmp_path / f"{task}.done").exists(),
        lease_file=lambda task: tmp_path / f"{task}.lease",
    )
    assert len(list(tmp_path.iterdir())) == 5
