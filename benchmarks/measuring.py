"""What the benchmarks share: cases, taking turns, and saying where they ran."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from shapes import SHAPES


@dataclass(frozen=True)
class Case:
    """A shape of `shapes`, and how many rows of how many tokens."""

    shape: str
    rows: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """Read SHAPE:ROWSxTOKENS."""
        shape, _, size = text.partition(":")
        rows, _, tokens = size.partition("x")
        if shape not in SHAPES or not rows.isdigit() or not tokens.isdigit():
            raise SystemExit(f"{text}: not SHAPE:ROWSxTOKENS with a shape of {', '.join(SHAPES)}")
        return cls(shape, int(rows), int(tokens))


def taking_turns(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):  # the first compiles and warms up
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def tpu_mesh(topology: str, data: int, model: int) -> Mesh:
    """A mesh over the chips of a TPU topology (`v5e:4x4`) to compile for; needs libtpu, no TPU."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return jax.make_mesh((data, model), ("data", "model"), devices=devices, axis_types=(AxisType.Explicit,) * 2)


def circumstances(setting: str, rounds: int) -> str:
    """Hardware, versions and setting, as a line of Markdown."""
    device = jax.devices()[0]
    kind = f"{_cpu_name()}, {os.cpu_count()} logical cores" if device.platform == "cpu" else device.device_kind
    versions = ", ".join(_installed(name) for name in ("jax", "jaxlib", "torch", "transformers"))
    return f"{kind}; {setting}; Python {platform.python_version()}, {versions}; median of {rounds} rounds.\n"


def _installed(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()
