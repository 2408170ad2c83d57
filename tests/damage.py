"""Random damages to folders, and how the program takes them."""

from __future__ import annotations

import os
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain.errors import SelftrainError

MAX_ZEROS = 64


@dataclass(frozen=True)
class Subject:
    """A folder that is damaged, and the program that reads it."""

    name: str
    folder: Path
    read: Callable[[Path], Any]
    """Read a copy of the folder; return all that follows from it."""


@dataclass
class Tally:
    """Number of damages by the reaction of the program."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    """Silent damages and tracebacks, in words."""


def list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def damage(folder: Path, rng: np.random.Generator) -> str:
    """Damage a random file, whatever its size; return a description."""
    files = list_files(folder)
    path = files[rng.integers(len(files))]
    name, size = path.relative_to(folder).as_posix(), path.stat().st_size
    kind = rng.choice(["flip", "truncate", "zero", "swap", "delete"] if size else ["swap", "delete"])
    if kind == "delete":
        path.unlink()
        return f"{name}: deleted"
    if kind == "swap":
        other = files[rng.integers(len(files))]
        contents = path.read_bytes(), other.read_bytes()
        path.write_bytes(contents[1])
        other.write_bytes(contents[0])
        return f"{name}: swapped with {other.relative_to(folder).as_posix()}"
    content, position = bytearray(path.read_bytes()), int(rng.integers(size))
    if kind == "flip":
        bit = int(rng.integers(8))
        content[position] ^= 1 << bit
        what = f"bit {bit} of byte {position} flipped"
    elif kind == "truncate":
        del content[position:]
        what = f"truncated to {position} of {size} bytes"
    else:
        length = min(int(rng.integers(1, MAX_ZEROS + 1)), size - position)
        content[position : position + length] = bytes(length)
        what = f"{length} bytes from {position} zeroed"
    path.write_bytes(content)
    return f"{name}: {what}"


def age_leases(folder: Path) -> None:
    """Make leases old enough that any process takes them over."""
    for path in folder.rglob("*.lease"):
        os.utime(path, (time.time() - 86_400,) * 2)


def tally(subject: Subject, n: int, work: Path, seed: int = 0) -> Tally:
    """Damage copies of a folder at random, and read each.

    Args:
      subject: what is damaged.
      n: number of damages.
      work: a folder for the copies, always under the same name.
      seed: of the damages.
    """
    expected = _read_copy(subject, work, lambda copy: None)
    assert _same(expected, _read_copy(subject, work, lambda copy: None)), f"{subject.name}: not reproducible"
    found = Tally()
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        what = ""

        def harm(copy: Path, rng: np.random.Generator = rng) -> None:
            nonlocal what
            what = damage(copy, rng)

        try:
            outcome = _read_copy(subject, work, harm)
            reaction = "harmless" if _same(expected, outcome) else "silent"
            detail = _difference(expected, outcome) if reaction == "silent" else ""
        except SelftrainError:
            reaction, detail = "refused", ""
        except Exception:  # any other exception is the defect that is counted here, and fails the test
            reaction, detail = "traceback", traceback.format_exc(limit=-4)
        found.counts[reaction] += 1
        if reaction in ("silent", "traceback"):
            found.failures.append(f"{subject.name} {i}: {what}: {reaction} {detail}")
    return found


def _read_copy(subject: Subject, work: Path, harm: Callable[[Path], None]) -> Any:
    copy = work / subject.folder.name
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(subject.folder, copy)
    harm(copy)
    age_leases(copy)
    return subject.read(copy)


def _same(first: Any, second: Any) -> bool:
    return first == second


def _difference(first: dict[str, Any], second: dict[str, Any]) -> str:
    names = [name for name in first.keys() | second.keys() if first.get(name) != second.get(name)]
    return f"({', '.join(sorted(names))} differ)"
