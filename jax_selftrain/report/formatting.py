"""Labels, units and estimates of the measures of `results.json`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax_selftrain.report.tables import Column, Level, Table, format_interval, format_number
from jax_selftrain.stats.estimators import Estimate
from jax_selftrain.study.measure_names import display_scale

Results = Mapping[str, Any]
Records = Sequence[Mapping[str, Any]]
SIDES = ("before", "after", "change")
CURVE_METRICS = {
    "nll": ("loss on text (nats per token)", 1.0),
    "acc": ("accuracy (%)", 100.0),
    "exact_match": ("exact match (%)", 100.0),
    "log_pz": ("mean log p_z (nats)", 1.0),
    "pz": ("mean p_z (%)", 100.0),
}
"""Axis label and scale of the evaluations during training, by the last part of their name."""


def get_decimals(measure: str) -> int:
    """Return the number of decimals that the report shows."""
    return 2 if display_scale(measure) == 100.0 else 4


def format_measure(measure: str) -> str:
    """Return name and unit of a measure."""
    kind, _, name = measure.partition("/")
    suffix = f", {name}" if name else ""
    return {
        "accuracy": "chance-normalized macro accuracy (points)",
        "task": f"{name} (points)",
        "log_odds": f"log-odds of the correct choice{suffix} (nats)",
        "text": f"{name} (bits per byte)",
        "exact_match": f"exact match{suffix} (points)",
        "pz": f"mean p_z{suffix} (points)",
        "log_pz": f"mean log p_z{suffix} (nats)",
    }[kind]


def slugify(name: str) -> str:
    """Return a name as part of a file name."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def parse_estimate(entry: Mapping[str, Any]) -> Estimate:
    """Return an estimate of `results.json`."""
    return Estimate(entry["value"], entry["low"], entry["high"], entry["n"])


def parse_sides(entry: Mapping[str, Any] | None) -> list[Estimate | None]:
    """Return the estimates before, after and of the change."""
    return [parse_estimate(entry[side]) if entry else None for side in SIDES]


def parse_change(entry: Mapping[str, Any]) -> Estimate:
    """Return the change of an effect, over items for one seed."""
    change = parse_estimate(entry["change"])
    if change.n > 1:
        return change
    low, high = entry["one_pair"]
    return Estimate(change.value, low, high, entry["items"])


def natural_sort(names: Iterable[str]) -> list[str]:
    """Sort names by their numbers: 2× before 16×."""
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def parse_displayed(entry: Mapping[str, Any], measure: str) -> Estimate:
    """Return an estimate of `results.json` in display units."""
    return to_display_units(parse_estimate(entry), measure)


def parse_displayed_sides(entry: Mapping[str, Any], measure: str) -> list[Estimate]:
    """Return the estimates before, after and of the change in display units."""
    return [parse_displayed(entry[side], measure) for side in SIDES]


def parse_displayed_change(entry: Mapping[str, Any], measure: str) -> Estimate:
    """Return the change of an effect in display units."""
    return to_display_units(parse_change(entry), measure)


def to_display_units(estimate: Estimate, measure: str) -> Estimate:
    """Convert an estimate to the unit that the report shows."""
    scale = display_scale(measure)
    low, high = (None if end is None else scale * end for end in (estimate.low, estimate.high))
    return Estimate(scale * estimate.value, low, high, estimate.n)


def select_student(records: Records, student: str) -> list[Mapping[str, Any]]:
    """Return the cells or effects of a student."""
    return [one for one in records if one["student"] == student]


def make_change_columns(measures: Iterable[str]) -> list[Column]:
    """Return a column of changes for each measure."""
    return [Column(measure, format_measure(measure), get_decimals(measure), signed=True) for measure in measures]


def pick(record: Mapping[str, Any], *keys: str) -> tuple[Any, ...]:
    """Return the values of some keys."""
    return tuple(record[key] for key in keys)


def make_effect_table(name: str, caption: str, effects: Records, measures: Sequence[str]) -> Table:
    """Return a table of levels before training and changes by treatment."""
    base = {measure: one["measures"][measure]["before"] for one in effects for measure in one["measures"]}
    before = [Level(display_scale(one) * base[one]) if one in base else None for one in measures]
    rows = [
        (
            one["treatment"],
            len(one["seeds"]),
            *(
                parse_displayed_change(one["measures"][name], name) if name in one["measures"] else None
                for name in measures
            ),
        )
        for one in effects
    ]
    heads = [Column("treatment"), Column("seeds"), *make_change_columns(measures)]
    return Table(name, f"{caption}: before, and change by treatment", heads, [("before", None, *before), *rows], 1)


def make_cell_table(
    name: str, caption: str, heads: Sequence[Column], rows: Iterable[tuple[Any, Sequence[Any]]]
) -> Table:
    """Return a table over the cells of a study.

    Args:
        name, caption: of the table.
        heads: columns of the rows.
        rows: (cell, row) pairs. Student, treatment and seed are added if the rows come from several cells.
    """
    pairs = list(rows)
    if len({id(cell) for cell, _ in pairs}) < 2:
        return Table(name, caption, heads, [row for _, row in pairs])
    keys = [Column("student"), Column("treatment"), Column("seed")]
    full = [(cell["student"], cell["treatment"], str(cell["seed"]), *row) for cell, row in pairs]
    return Table(name, caption, [*keys, *heads], full)


def describe_zero(change: Estimate) -> str:
    """Say whether the interval includes zero; empty without an interval."""
    if change.low is None or change.high is None:
        return ""
    return "The interval includes zero." if change.low <= 0 <= change.high else "The interval excludes zero."


def format_change(change: Estimate, measure: str) -> tuple[str, str]:
    """Format a signed change and its interval in display units."""
    shown, digits = to_display_units(change, measure), get_decimals(measure)
    return format_number(shown.value, digits, signed=True), format_interval(shown, digits, signed=True)
