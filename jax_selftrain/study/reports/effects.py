"""The table of what treatments changed, one row for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jax_selftrain.study.measures import digits_of, estimate_of, label_of, scaled
from jax_selftrain.study.reports.tables import Column, Table

Effects = Sequence[Mapping[str, Any]]


def effect_table(name: str, caption: str, effects: Effects, measures: Sequence[str]) -> Table:
    rows = tuple(
        (
            one["treatment"],
            len(one["seeds"]),
            *(
                scaled(estimate_of(one["measures"][measure]["change"]), measure) if measure in one["measures"] else None
                for measure in measures
            ),
        )
        for one in effects
    )
    changes = (Column(measure, label_of(measure), digits_of(measure), signed=True) for measure in measures)
    columns = (Column("treatment", "treatment"), Column("seeds", "seeds"), *changes)
    return Table(name, f"{caption}, change", columns, rows)
