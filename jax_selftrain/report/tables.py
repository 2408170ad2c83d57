"""Tables that the report shows rounded and that CSV files hold unrounded."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

from jax_selftrain.stats.estimators import Estimate
from jax_selftrain.study.measure_names import display_scale

Record = Mapping[str, Any]
Cell = str | int | float | Estimate | None


class Level(float):
    """A level in a column of changes, shown without a plus sign."""


def parse_estimate(entry: Record, measure: str = "") -> Estimate:
    """Return an estimate of `results.json`, in the display unit of a measure."""
    scale = display_scale(measure)
    low, high = (None if entry[end] is None else scale * entry[end] for end in ("low", "high"))
    return Estimate(scale * entry["value"], low, high, entry["n"])


@dataclass(frozen=True)
class Column:
    """Name, rounding and source of one column."""

    key: str
    """Name in the CSV; an estimate also fills `KEY_low` and `KEY_high`."""
    title: str = ""
    """Heading in the report; unset: the key with spaces."""
    digits: int = 3
    """Decimals in the report, of numbers that are not integers."""
    scale: float = 1.0
    """Factor in the report only, for instance 100 for percentages."""
    signed: bool = False
    """Show a plus sign, for changes."""
    p_value: bool = False
    """Show a number that rounds to zero as smaller than the last digit."""
    path: tuple[str, ...] = ()
    """Keys that lead to the value in a record; unset: `key`."""
    measure: str = ""
    """Measure of the value; page and CSV hold it in the display unit. `*`: the measure that the record names."""
    convert: Callable[[Any], Cell] | None = None
    """Function of a value that is neither a number, a text nor an estimate."""

    def find(self, record: Record) -> Cell:
        """Return the value in a record; None if a part is missing.

        Lists of names are joined; of other lists, the length is returned.
        """
        value: Any = record
        for key in self.path or (self.key,):
            value = None if value is None else value.get(key)
        if value is None or isinstance(value, Level):
            return value
        if self.convert is not None:
            return self.convert(value)
        measure = record["measure"] if self.measure == "*" else self.measure
        if isinstance(value, Mapping):
            return parse_estimate(value, measure)
        if isinstance(value, list):
            return ", ".join(value) if all(isinstance(one, str) for one in value) else len(value)
        return display_scale(measure) * value if measure else value


def make_columns(*keys: str) -> list[Column]:
    """Return columns with default headings."""
    return [Column(key) for key in keys]


def make_side_columns(
    key: str, title: str, digits: int = 1, scale: float = 100, path: Sequence[str] | None = None
) -> list[Column]:
    """Return columns before, after and of the change; of proportions by default."""
    titles, path = (
        {"before": f"{title}, before", "after": "after", "change": "change"},
        (key,) if path is None else path,
    )
    return [
        Column(f"{key}_{side}", text, digits, scale, signed=side == "change", path=(*path, side))
        for side, text in titles.items()
    ]


@dataclass(frozen=True)
class Table:
    """Columns of a table, and a record for each row."""

    name: str
    """File name of the CSV, without its ending."""
    caption: str
    columns: Sequence[Column]
    records: Sequence[Record]
    totals: int = 0
    """Number of highlighted rows at the top."""

    @property
    def rows(self) -> list[list[Cell]]:
        """Cells of each row."""
        return [[column.find(record) for column in self.columns] for record in self.records]

    def to_html(self) -> str:
        """Return an HTML element; estimates have their interval below."""
        rows = self.rows
        is_text = [any(isinstance(row[i], str) for row in rows) for i in range(len(self.columns))]
        kinds = [' class="text"' if text else "" for text in is_text]
        head = "".join(
            f"<th{kind}>{escape(c.title or c.key.replace('_', ' '))}</th>"
            for c, kind in zip(self.columns, kinds, strict=True)
        )
        lines = [f'<div class="scroll"><table><caption>{escape(self.caption)}</caption>']
        lines.append(f"<thead><tr>{head}</tr></thead>")
        for i, row in enumerate(rows):
            lines.append('<tr class="total">' if i < self.totals else "<tr>")
            lines += [
                f"<td{kind}>{_cell_html(cell, column)}</td>"
                for cell, column, kind in zip(row, self.columns, kinds, strict=True)
            ]
            lines.append("</tr>")
        return "\n".join([*lines, "</table></div>"])

    def to_csv(self) -> str:
        """Return the rows unrounded and unscaled."""
        rows = self.rows
        wide = [any(isinstance(row[i], Estimate) for row in rows) for i in range(len(self.columns))]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        endings = [("", "_low", "_high") if w else ("",) for w in wide]
        writer.writerow([f"{c.key}{end}" for c, group in zip(self.columns, endings, strict=True) for end in group])
        for row in rows:
            writer.writerow([value for cell, w in zip(row, wide, strict=True) for value in _csv_cells(cell, wide=w)])
        return text.getvalue()


def format_number(value: float, digits: int = 3, *, scale: float = 1.0, signed: bool = False) -> str:
    """Format a number with fixed decimals and a true minus sign."""
    text = f"{value * scale:+,.{digits}f}" if signed else f"{value * scale:,.{digits}f}"
    if not any(digit in "123456789" for digit in text):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def format_interval(estimate: Estimate, digits: int = 3, *, scale: float = 1.0, signed: bool = False) -> str:
    """Format an interval as `[low, high]`."""
    if estimate.low is None or estimate.high is None:
        return "[no interval from one]"
    low, high = (format_number(end, digits, scale=scale, signed=signed) for end in (estimate.low, estimate.high))
    return f"[{low}, {high}]"


def _cell_html(cell: Cell, column: Column) -> str:
    signed = column.signed and not isinstance(cell, Level)
    show = partial(format_number, digits=column.digits, scale=column.scale, signed=signed)
    match cell:
        case None:
            return "–"
        case str():
            return escape(cell).replace("_", "_<wbr>")
        case int():
            return f"{cell:,}"
        case Estimate():
            ends = format_interval(cell, column.digits, scale=column.scale, signed=column.signed)
            return f"{show(cell.value)}<small>{ends}</small>"
    if column.p_value and cell < 10**-column.digits:
        return f"&lt; {10**-column.digits:g}"
    return show(cell)


def _csv_cells(cell: Cell, *, wide: bool) -> Sequence[str | int | float]:
    if isinstance(cell, Estimate):
        return [cell.value, *("" if end is None else end for end in (cell.low, cell.high))]
    return ["" if cell is None else cell, *(["", ""] if wide else [])]
