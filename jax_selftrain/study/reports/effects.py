"""The table of what treatments changed, one row for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jax_selftrain.study.measures import scale_of
from jax_selftrain.study.reports.shown import change_of, digits_of, label_of, scaled
from jax_selftrain.study.reports.tables import Column, Level, Table

Effects = Sequence[Mapping[str, Any]]


ONE_SEED = "Intervals are over seeds; with one seed, in brackets, over the items of that one pair of checkpoints."


def effect_table(name: str, caption: str, effects: Effects, measures: Sequence[str]) -> Table:
    """What one student could do before, then the change by each of its treatments."""
    base = {measure: one["measures"][measure]["before"] for one in effects for measure in one["measures"]}
    before = tuple(Level(scale_of(one) * base[one]) if one in base else None for one in measures)
    rows = tuple(
        (
            one["treatment"],
            len(one["seeds"]),
            *(
                scaled(change_of(one["measures"][measure]), measure) if measure in one["measures"] else None
                for measure in measures
            ),
        )
        for one in effects
    )
    changes = (Column(measure, label_of(measure), digits_of(measure), signed=True) for measure in measures)
    columns = (Column("treatment", "treatment"), Column("seeds", "seeds"), *changes)
    return Table(name, f"{caption}, before and its change", columns, (("before", None, *before), *rows), totals=1)
