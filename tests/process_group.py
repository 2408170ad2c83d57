"""The command line in several real processes on this machine, which meet over loopback."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax_selftrain

ROOT = Path(jax_selftrain.__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start_one(words: Sequence[object], *flags: object, devices: int = 2, **environment: str) -> subprocess.Popen[str]:
    """`jax-selftrain WORDS FLAGS` in a process of its own with so many simulated devices."""
    # JAX sets this one itself when it is imported, as it has been here but not yet there.
    inherited = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    xla_flags = re.sub(r"(?<=device_count=)\d+", str(devices), os.environ["XLA_FLAGS"])
    return subprocess.Popen(
        [sys.executable, "-m", "jax_selftrain", *map(str, words), *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**inherited, "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags, **environment},
    )


def start(words: Sequence[object], processes: int, *flags: object, devices: int = 2) -> list[subprocess.Popen[str]]:
    """The same command in each of several processes; one process is started without any flag."""
    if processes == 1:
        return [start_one(words, *flags, devices=devices)]
    meeting = ("--coordinator", f"localhost:{free_port()}", "--num-processes", processes)
    return [start_one(words, *meeting, "--process-id", index, *flags, devices=devices) for index in range(processes)]


def ends(processes: Sequence[subprocess.Popen[str]], seconds: float = 300.0) -> tuple[list[int], list[str]]:
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


def kill_when(
    processes: Sequence[subprocess.Popen[str]], victim: int, ready: Callable[[], bool], seconds: float = 240.0
) -> float:
    """SIGKILL one of the processes as soon as it is `ready`; returns when that was."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            raise AssertionError(f"it never came to the moment of the kill: {ends(processes, 5)}")
        time.sleep(0.01)
    processes[victim].send_signal(signal.SIGKILL)
    return time.monotonic()
