"""The table of what treatments changed, one row for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jax_selftrain.report.formatting import decimals, label, parse_change, to_display_units
from jax_selftrain.report.tables import Column, RowHeader, Table
from jax_selftrain.study.measure_names import display_scale

Effects = Sequence[Mapping[str, Any]]


ONE_SEED_NOTE = "Intervals are over seeds; with one seed, in brackets, over the items of that one pair of checkpoints."


def effect_table(name: str, caption: str, effects: Effects, measures: Sequence[str]) -> Table:
    """What one student could do before, then the change by each of its treatments."""
    base = {measure: one["measures"][measure]["before"] for one in effects for measure in one["measures"]}
    before = tuple(RowHeader(display_scale(one) * base[one]) if one in base else None for one in measures)
    rows = tuple(
        (
            one["treatment"],
            len(one["seeds"]),
            *(
                to_display_units(parse_change(one["measures"][measure]), measure)
                if measure in one["measures"]
                else None
                for measure in measures
            ),
        )
        for one in effects
    )
    changes = (Column(measure, label(measure), decimals(measure), signed=True) for measure in measures)
    columns = (Column("treatment", "treatment"), Column("seeds", "seeds"), *changes)
    return Table(name, f"{caption}, before and its change", columns, (("before", None, *before), *rows), footer=1)
