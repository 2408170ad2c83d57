"""Chapters, labels of measures, and tables of effects and cells."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from importlib.resources import files
from typing import Any

import yaml

from jax_selftrain.report.tables import Column, Level, Record, Table, make_columns, parse_estimate
from jax_selftrain.stats.estimators import Estimate
from jax_selftrain.study.measure_names import display_scale

Results = Mapping[str, Any]
Records = Sequence[Record]
NOTES: Mapping[str, Any] = yaml.safe_load(files("jax_selftrain.report").joinpath("notes.yaml").read_text("utf-8"))
"""Prose of the chapters."""
CURVE_METRICS = {
    "nll": ("loss on text (nats per token)", 1.0),
    "acc": ("accuracy (%)", 100.0),
    "exact_match": ("exact match (%)", 100.0),
    "log_pz": ("mean log p_z (nats)", 1.0),
    "pz": ("mean p_z (%)", 100.0),
}
"""Axis label and scale of the evaluations during training, by the last part of their name."""


@dataclass
class Chapter:
    """One chapter of the page, filled in the order of its parts."""

    title: str
    html: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: dict[str, str] = field(default_factory=dict)
    """SVG text by name."""

    def add_table(self, table: Table, *, folded: bool = False) -> None:
        """Add a table unless it is empty; a click opens folded ones."""
        if table.records:
            self.tables.append(table)
            html, caption = table.to_html(), escape(table.caption)
            self.html.append(f"<details><summary>{caption}</summary>\n{html}\n</details>" if folded else html)

    def add_figure(self, figure: tuple[str, str], caption: str) -> None:
        """Add a figure, as (name, SVG), with its caption (plain text)."""
        name, svg = figure
        self.figures[name] = svg
        self.html.append(f"<figure>\n{svg}<figcaption>{escape(caption)}</figcaption>\n</figure>")

    def add_note(self, text: str) -> None:
        """Add a paragraph in small print (plain text)."""
        self.html.append(f'<p class="note">{escape(text)}</p>')


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


def natural_sort(names: Iterable[str]) -> list[str]:
    """Sort names by their numbers: 2× before 16×."""
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def parse_change(entry: Record, measure: str) -> Estimate:
    """Return the change of an effect; for one seed over items."""
    change = entry["change"]
    if change["n"] == 1:
        low, high = entry["one_pair"]
        change = {"value": change["value"], "low": low, "high": high, "n": entry["items"]}
    return parse_estimate(change, measure)


def make_change_columns(measures: Iterable[str]) -> list[Column]:
    """Return a column of effects for each measure."""
    return [
        Column(
            name, format_measure(name), get_decimals(name), signed=True, path=("measures", name),
            convert=partial(parse_change, measure=name),
        )
        for name in measures
    ]  # fmt: skip


def add_effect_table(
    chapter: Chapter, name: str, student: str, caption: str, effects: Records, measures: Sequence[str]
) -> None:
    """Add a table of levels before training and changes by treatment."""
    if not measures:
        return
    base = {name: entry["before"] for one in effects for name, entry in one["measures"].items()}
    levels = {name: Level(display_scale(name) * level) for name, level in base.items()}
    columns = [*make_columns("treatment", "seeds"), *make_change_columns(measures)]
    caption = f"{student}, {caption}: before, and change by treatment"
    records: list[Record] = [{"treatment": "before", "measures": levels}, *effects]
    chapter.add_table(Table(f"{name}_{slugify(student)}", caption, columns, records, 1))


def make_cell_table(
    name: str, caption: str, columns: Sequence[Column], records: Iterable[tuple[Record, Record]]
) -> Table:
    """Return a table over cells, from (cell, record) pairs.

    Columns of student, treatment and seed are added if there are several cells.
    """
    pairs = list(records)
    if len({id(cell) for cell, _ in pairs}) < 2:
        return Table(name, caption, columns, [record for _, record in pairs])
    keys = ("student", "treatment", "seed")
    full = [{**record, **{key: str(cell[key]) for key in keys}} for cell, record in pairs]
    return Table(name, caption, [*make_columns(*keys), *columns], full)
