"""Start commands as programs of several processes on this machine."""

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


def start_process(words: Sequence[object], *flags: object, devices: int = 2, **environment: str) -> Launched:
    """Start `jax-selftrain WORDS FLAGS` with simulated devices."""
    return launch(*words, *flags, JAX_NUM_CPU_DEVICES=str(devices), **environment)


def start_processes(words: Sequence[object], processes: int, *flags: object, devices: int = 2) -> list[Launched]:
    """Start a command in several processes; one process needs no flags."""
    if processes == 1:
        return [start_process(words, *flags, devices=devices)]
    coordinator = ("--coordinator", f"localhost:{free_port()}", "--num-processes", processes)
    return [
        start_process(words, *coordinator, "--process-id", index, *flags, devices=devices) for index in range(processes)
    ]


def wait_for_all(processes: Sequence[Launched], seconds: float = 300.0) -> tuple[list[int], list[str]]:
    """Wait for all processes; return (exit codes, texts of standard error)."""
    deadline = time.monotonic() + seconds
    errors = []
    try:
        for process in processes:
            errors.append(process.communicate(timeout=max(1.0, deadline - time.monotonic()))[1])
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


def kill_when(processes: Sequence[Launched], victim: int, ready: Callable[[], bool], seconds: float = 240.0) -> float:
    """Kill a process when `ready()`; return the monotonic time."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            raise AssertionError(f"the condition of the kill was never met: {wait_for_all(processes, 5)}")
        time.sleep(0.01)
    processes[victim].send_signal(signal.SIGKILL)
    return time.monotonic()
