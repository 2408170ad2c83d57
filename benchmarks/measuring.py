"""Helpers of the benchmarks: cases, alternation, description of the machine."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from shapes import SHAPES


@dataclass(frozen=True)
class Case:
    """Model shape, number of rows and tokens per row."""

    shape: str
    rows: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """Parse SHAPE:ROWSxTOKENS."""
        shape, _, size = text.partition(":")
        rows, _, tokens = size.partition("x")
        if shape not in SHAPES or not rows.isdigit() or not tokens.isdigit():
            raise SystemExit(f"{text}: not SHAPE:ROWSxTOKENS with a shape of {', '.join(SHAPES)}")
        return cls(shape, int(rows), int(tokens))


@dataclass(frozen=True)
class CpuTime:
    """Seconds of a call."""

    wall: float
    user: float
    """Seconds of all cores in user mode."""


def spend(run: Callable[[], Any]) -> tuple[CpuTime, Any]:
    """Measure a call, and return its result."""
    began, user = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
    result = run()
    return CpuTime(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_utime - user), result


def alternate(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Measure the seconds of each contestant in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):  # the first compiles and warms up
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def peak_memory() -> float:
    """Return the peak memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def add_peers(
    contestants: dict[str, Callable[[], Any]], make: Callable[[bool], Callable[[], Any]], compiled: Sequence[bool]
) -> list[str]:
    """Add transformers, eager or compiled, to the contestants if it runs.

    Returns notes on peers that cannot be imported, run out of memory or cannot be compiled.
    """
    notes = []
    for with_compile in compiled:
        name = "transformers, compiled" if with_compile else "transformers"
        try:
            peer = make(with_compile)
            peer()
        except (ImportError, RuntimeError) as error:
            notes.append(f"* {name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        else:
            contestants[name] = peer
    return notes


def compare_with_peers(speed: dict[str, list[float]]) -> str:
    """Return table cells: our median speed, the fastest peer's, the ratio."""
    middle = {name: statistics.median(values) for name, values in speed.items()}
    peer = max((name for name in speed if name.startswith("transformers")), key=middle.__getitem__, default=None)
    if peer is None:
        return f"{middle['ours']:,.0f} | — | —"
    ratios = [a / b for a, b in zip(speed["ours"], speed[peer], strict=True)]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
    return f"{middle['ours']:,.0f} | {middle[peer]:,.0f} | {spread}"


def describe_run(setting: str, rounds: int) -> str:
    """Return hardware, versions and setting as a line of Markdown."""
    device = jax.devices()[0]
    kind = f"{_cpu_name()}, {os.cpu_count()} logical cores" if device.platform == "cpu" else device.device_kind
    versions = ", ".join(_package_version(name) for name in ("jax", "jaxlib", "torch", "transformers"))
    return f"{kind}; {setting}; Python {platform.python_version()}, {versions}; median of {rounds} rounds.\n"


def _package_version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()
