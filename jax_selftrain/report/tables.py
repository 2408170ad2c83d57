"""A table is written once and shown twice: rounded for the eye in the report, unrounded in a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import escape

from jax_selftrain.stats.estimators import Estimate

Cell = str | int | float | Estimate | None


class RowHeader(float):
    """A number that stands in a column of changes and is none: shown without a plus sign."""


@dataclass(frozen=True)
class Column:
    """How one column is named and rounded."""

    key: str
    """Name in the CSV; an estimate also fills `KEY_low` and `KEY_high`."""
    title: str
    """Name in the report."""
    digits: int = 3
    """Decimals in the report, of numbers that are not integers."""
    scale: float = 1.0
    """Factor in the report only, for instance 100 for percentages."""
    signed: bool = False
    """Show a plus sign: the column holds changes."""
    p_value: bool = False
    """Show what would round to zero as smaller than the last digit."""


@dataclass(frozen=True)
class Table:
    """Columns and rows; `totals` rows at the top are set off."""

    name: str
    """File name of the CSV, without its ending."""
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    footer: int = 0

    def to_html(self) -> str:
        """The table as an HTML element, estimates with their interval below."""
        kinds = [' class="text"' if _is_text([row[i] for row in self.rows]) else "" for i in range(len(self.columns))]
        head = "".join(f"<th{kind}>{escape(c.title)}</th>" for c, kind in zip(self.columns, kinds, strict=True))
        lines = [
            f'<div class="scroll"><table><caption>{escape(self.caption)}</caption>',
            f"<thead><tr>{head}</tr></thead>",
        ]
        for place, row in enumerate(self.rows):
            lines.append('<tr class="total">' if place < self.footer else "<tr>")
            for cell, column, kind in zip(row, self.columns, kinds, strict=True):
                lines.append(f"<td{kind}>{_cell(cell, column)}</td>")
            lines.append("</tr>")
        return "\n".join([*lines, "</table></div>"])

    def to_csv(self) -> str:
        """The same rows unrounded and unscaled."""
        wide = [any(isinstance(row[i], Estimate) for row in self.rows) for i in range(len(self.columns))]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        ends = [("", "_low", "_high") if w else ("",) for w in wide]
        writer.writerow([f"{c.key}{end}" for c, group in zip(self.columns, ends, strict=True) for end in group])
        for row in self.rows:
            writer.writerow([value for cell, w in zip(row, wide, strict=True) for value in _raw(cell, wide=w)])
        return text.getvalue()


def number(value: float, digits: int = 3, *, scale: float = 1.0, signed: bool = False) -> str:
    """A number for the eye: fixed decimals, thousands separated, a true minus sign, never "−0.00"."""
    text = f"{value * scale:+,.{digits}f}" if signed else f"{value * scale:,.{digits}f}"
    if not any(digit in "123456789" for digit in text):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def interval(estimate: Estimate, digits: int = 3, *, scale: float = 1.0, signed: bool = False) -> str:
    """`[low, high]` for the eye."""
    if estimate.low is None or estimate.high is None:
        return "[no interval from one]"
    low, high = (number(end, digits, scale=scale, signed=signed) for end in (estimate.low, estimate.high))
    return f"[{low}, {high}]"


def _cell(cell: Cell, column: Column) -> str:
    signed = column.signed and not isinstance(cell, RowHeader)
    show = partial(number, digits=column.digits, scale=column.scale, signed=signed)
    match cell:
        case None:
            return "–"
        case str():
            return escape(cell).replace("_", "_<wbr>")
        case int():
            return f"{cell:,}"
        case Estimate():
            ends = interval(cell, column.digits, scale=column.scale, signed=column.signed)
            return f"{show(cell.value)}<small>{ends}</small>"
    if column.p_value and cell < 10**-column.digits:
        return f"&lt; {10**-column.digits:g}"
    return show(cell)


def _raw(cell: Cell, *, wide: bool) -> Sequence[str | int | float]:
    if isinstance(cell, Estimate):
        return [cell.value, *("" if end is None else end for end in (cell.low, cell.high))]
    return ["" if cell is None else cell, *(["", ""] if wide else [])]


def _is_text(cells: Sequence[Cell]) -> bool:
    return any(isinstance(cell, str) for cell in cells)
