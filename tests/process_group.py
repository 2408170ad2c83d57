"""The command line in several real processes on this machine, which meet over loopback."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launcher import Launched, launch

import jax_selftrain

ROOT = Path(jax_selftrain.__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start_one(words: Sequence[object], *flags: object, devices: int = 2, **environment: str) -> Launched:
    """Start `jax-selftrain WORDS FLAGS` in a process of its own with simulated devices."""
    return launch(*words, *flags, JAX_NUM_CPU_DEVICES=str(devices), **environment)


def start(words: Sequence[object], processes: int, *flags: object, devices: int = 2) -> list[Launched]:
    """The same command in each of several processes; one process is started without any flag."""
    if processes == 1:
        return [start_one(words, *flags, devices=devices)]
    meeting = ("--coordinator", f"localhost:{free_port()}", "--num-processes", processes)
    return [start_one(words, *meeting, "--process-id", index, *flags, devices=devices) for index in range(processes)]


def ends(processes: Sequence[Launched], seconds: float = 300.0) -> tuple[list[int], list[str]]:
    """(exit codes, what each wrote to standard error), once all have ended; none outlives the call."""
    deadline = time.monotonic() + seconds
    said = []
    try:
        for process in processes:
            said.append(process.communicate(timeout=max(1.0, deadline - time.monotonic()))[1])
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def kill_when(processes: Sequence[Launched], victim: int, ready: Callable[[], bool], seconds: float = 240.0) -> float:
    """SIGKILL one of the processes as soon as it is `ready`; returns when that was."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            raise AssertionError(f"it never came to the moment of the kill: {ends(processes, 5)}")
        time.sleep(0.01)
    processes[victim].send_signal(signal.SIGKILL)
    return time.monotonic()
