"""Names of treatments and measures in `results.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MAIN_EFFECT = "source "
"""Prefix of the treatment of a main cell: `source NAME`."""
HELD_OUT = "H"
"""Suffix of measures of the held-out half of the sequences: `exact_match/H`."""
AFTER_RELEARNING, UNSEEN = "after_relearning", "unseen"
"""Names of probes that are not formats."""
FORMATTED, GROUP = "format ", "group "
"""Prefixes: `exact_match/format NAME`, `exact_match/group NAME`."""


def common_measures(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the measures that all cells (or effects) have."""
    return [name for name in cells[0]["measures"] if all(name in cell["measures"] for cell in cells)]


def main_measure(results: Mapping[str, Any]) -> str:
    """Return the headline measure: accuracy, else a text, else exact match."""
    names = common_measures(results["cells"])
    return next(
        (name for name in ("accuracy", *(n for n in names if n.startswith("text/"))) if name in names), names[0]
    )


def reference_text(levels: Mapping[str, float]) -> str | None:
    """Return the text that a base predicts best, for measuring damage.

    Args:
        levels: the base's level by measure.
    """
    texts = [name for name in levels if name.startswith("text/")]
    return min(texts, key=lambda name: levels[name]) if texts else None


def is_primary_format(measure: str) -> bool:
    """Return True unless the measure is of some sequences or tasks."""
    return not measure.startswith(("exact_match/", "log_pz/", "pz/", "log_odds/"))


def is_secondary(measure: str) -> bool:
    """Return True if the measure is of another format or after relearning."""
    part = measure.partition("/")[2]
    return measure.startswith(("exact_match/", "log_pz/")) and (part.startswith(FORMATTED) or part == AFTER_RELEARNING)


def display_scale(measure: str) -> float:
    """Return the factor to display a measure (100 for shares)."""
    return 100.0 if measure.startswith(("accuracy", "task/", "exact_match", "pz")) else 1.0
