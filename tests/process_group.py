"""Start commands in several processes on one machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from launcher import CommandProcess, launch

import jax_selftrain

ROOT = Path(jax_selftrain.__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start_process(args: Sequence[object], *flags: object, devices: int = 2, **environment: str) -> CommandProcess:
    """Start `jax-selftrain ARGS FLAGS` with simulated devices.

    Its programs compile as in folders named `sharding` (`simulated_devices`).
    """
    if "JAX_SELFTRAIN_TEST_OPTIMIZED" not in os.environ:
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    return launch(*args, *flags, JAX_NUM_CPU_DEVICES=str(devices), **environment)


def start_processes(args: Sequence[object], processes: int, *flags: object, devices: int = 2) -> list[CommandProcess]:
    """Start a command in several processes; one process needs no flags."""
    if processes == 1:
        return [start_process(args, *flags, devices=devices)]
    coordinator = ("--coordinator", f"localhost:{free_port()}", "--num-processes", processes)
    return [
        start_process(args, *coordinator, "--process-id", index, *flags, devices=devices) for index in range(processes)
    ]


def wait_for_all(processes: Sequence[CommandProcess], seconds: float = 300.0) -> tuple[list[int], list[str]]:
    """Wait for all processes; return (exit codes, standard error of each).

    After `seconds`, the test fails with the stacks of their threads.
    """
    deadline = time.monotonic() + seconds
    errors = []
    try:
        for process in processes:
            errors.append(process.communicate(timeout=max(1.0, deadline - time.monotonic()))[1])
    except subprocess.TimeoutExpired:
        pytest.fail("\n\n".join(process.dump_stacks() for process in processes))
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


def kill_when(
    processes: Sequence[CommandProcess], victim: int, is_ready: Callable[[], bool], seconds: float = 240.0
) -> float:
    """Kill a process when `is_ready()`; return the monotonic time."""
    deadline = time.monotonic() + seconds
    while not is_ready():
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            raise AssertionError(f"the condition of the kill was not met: {wait_for_all(processes, 5)}")
        time.sleep(0.01)
    processes[victim].send_signal(signal.SIGKILL)
    return time.monotonic()
