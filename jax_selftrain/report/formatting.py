"""How the measures of a study (`transfer.measures`) are named, rounded and set for people."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from jax_selftrain.report.tables import interval, number
from jax_selftrain.stats.estimators import Estimate
from jax_selftrain.study.measure_names import display_scale

POINTS = "points"


def decimals(measure: str) -> int:
    """Decimals shown."""
    return 2 if display_scale(measure) == 100.0 else 4


def label(measure: str) -> str:
    """Name and unit of a measure (`transfer.measures`) for people."""
    kind, _, name = measure.partition("/")
    return {
        "accuracy": "chance-normalized macro accuracy (points)",
        "task": f"{name} (points)",
        "log_odds": f"log-odds of the right choice{', ' + name if name else ''} (nats)",
        "text": f"{name} (bits per byte)",
        "exact_match": f"exact match{', ' + name if name else ''} (points)",
        "pz": f"mean p_z{', ' + name if name else ''} (points)",
        "log_pz": f"log p_z{', ' + name if name else ''} (nats)",
    }[kind]


def slug(name: str) -> str:
    """A name as part of a file name."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def parse_estimate(entry: Mapping[str, Any]) -> Estimate:
    """An estimate as it stands in `results.json`."""
    return Estimate(entry["value"], entry["low"], entry["high"], entry["n"])


def parse_change(entry: Mapping[str, Any]) -> Estimate:
    """The change of one treatment (an entry of `effects`): its interval is over seeds, of one seed over the items."""
    change = parse_estimate(entry["change"])
    if change.n > 1:
        return change
    low, high = entry["one_pair"]
    return Estimate(change.value, low, high, entry["items"])


def natural_sort(names: Iterable[str]) -> list[str]:
    """Sorted as people count: 2× before 16×."""
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def to_display_units(estimate: Estimate, measure: str) -> Estimate:
    """In the unit that is shown."""
    scale = display_scale(measure)
    low, high = (None if end is None else scale * end for end in (estimate.low, estimate.high))
    return Estimate(scale * estimate.value, low, high, estimate.n)


def format_signed(estimate: Estimate, measure: str) -> str:
    """A change with its sign and unit (HTML)."""
    unit = POINTS if display_scale(measure) == 100.0 else ""
    value = number(display_scale(measure) * estimate.value, decimals(measure), signed=True)
    return f'{value} <span class="unit">{unit}</span>'


def format_interval(estimate: Estimate, measure: str) -> str:
    """Its interval in the unit that is shown."""
    return interval(to_display_units(estimate, measure), decimals(measure), signed=True)


def zero_note(change: Estimate) -> str:
    """Whether the interval includes zero, as a sentence; empty where there is none."""
    if change.low is None or change.high is None:
        return ""
    return "The interval includes zero." if change.low <= 0 <= change.high else "The interval excludes zero."
