"""Tables that the report shows rounded and that CSV files hold unrounded."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import escape

from jax_selftrain.stats.estimators import Estimate

Cell = str | int | float | Estimate | None


class Level(float):
    """A level in a column of changes, shown without a plus sign."""


@dataclass(frozen=True)
class Column:
    """Name and rounding of one column."""

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

    @property
    def heading(self) -> str:
        return self.title or self.key.replace("_", " ")


def make_columns(*keys: str) -> list[Column]:
    """Return columns with default headings."""
    return [Column(key) for key in keys]


def make_side_columns(key: str, title: str, digits: int = 1, scale: float = 100) -> list[Column]:
    """Return columns before, after and of the change; of proportions by default."""
    titles = {"before": f"{title}, before", "after": "after", "change": "change"}
    return [Column(f"{key}_{side}", text, digits, scale, signed=side == "change") for side, text in titles.items()]


@dataclass(frozen=True)
class Table:
    """Columns and rows of a table."""

    name: str
    """File name of the CSV, without its ending."""
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    totals: int = 0
    """Number of highlighted rows at the top."""

    def to_html(self) -> str:
        """Return an HTML element; estimates have their interval below."""
        kinds = [' class="text"' if _is_text([row[i] for row in self.rows]) else "" for i in range(len(self.columns))]
        head = "".join(f"<th{kind}>{escape(c.heading)}</th>" for c, kind in zip(self.columns, kinds, strict=True))
        lines = [f'<div class="scroll"><table><caption>{escape(self.caption)}</caption>']
        lines.append(f"<thead><tr>{head}</tr></thead>")
        for i, row in enumerate(self.rows):
            lines.append('<tr class="total">' if i < self.totals else "<tr>")
            lines += [
                f"<td{kind}>{_cell_html(cell, column)}</td>"
                for cell, column, kind in zip(row, self.columns, kinds, strict=True)
            ]
            lines.append("</tr>")
        return "\n".join([*lines, "</table></div>"])

    def to_csv(self) -> str:
        """Return the rows unrounded and unscaled."""
        wide = [any(isinstance(row[i], Estimate) for row in self.rows) for i in range(len(self.columns))]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        endings = [("", "_low", "_high") if w else ("",) for w in wide]
        writer.writerow([f"{c.key}{end}" for c, group in zip(self.columns, endings, strict=True) for end in group])
        for row in self.rows:
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


def _is_text(cells: Sequence[Cell]) -> bool:
    return any(isinstance(cell, str) for cell in cells)
