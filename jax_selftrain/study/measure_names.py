"""The measures of a study (`transfer.measures`): which there are, which one the matrix is told in, and their scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HELD_OUT = "H"
"""What measures of the held-out half of the sequences are called: `exact_match/H`."""
RELEARNED, UNSEEN = "relearned", "never trained"
"""Views of memorization that are no formats."""
FORMATTED = "asked "
"""Measures of a format are called `exact_match/asked NAME`."""


def common_measures(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Measures that all of some cells (or effects) have, in the order of the first."""
    return [name for name in cells[0]["measures"] if all(name in cell["measures"] for cell in cells)]


def main_measure(results: Mapping[str, Any]) -> str:
    """What the matrix is told in: chance-normalized accuracy, else the first text, else exact match."""
    names = common_measures(results["cells"])
    return next(
        (name for name in ("accuracy", *(n for n in names if n.startswith("text/"))) if name in names), names[0]
    )


def reference_text(levels: Mapping[str, float]) -> str | None:
    """Of a base's levels by measure, the text that it predicts best: damage to a student is told on that one."""
    texts = [name for name in levels if name.startswith("text/")]
    return min(texts, key=lambda name: levels[name]) if texts else None


def is_primary_format(measure: str) -> bool:
    """Not one of a class or group of sequences, nor the log-odds of one task."""
    return not measure.startswith(("exact_match/", "log_pz/", "pz/", "log_odds/"))


def is_secondary(measure: str) -> bool:
    """Of sequences that were asked for in another format, or after relearning."""
    part = measure.partition("/")[2]
    return measure.startswith(("exact_match/", "log_pz/")) and (part.startswith(FORMATTED) or part == RELEARNED)


def display_scale(measure: str) -> float:
    """Factor from the measure's own unit to the one shown: percentage points of shares."""
    return 100.0 if measure.startswith(("accuracy", "task/", "exact_match", "pz")) else 1.0
