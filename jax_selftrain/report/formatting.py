"""Chapters, tables and labels of the report.

The page shows the numbers of a table rounded, its CSV file holds them unrounded.
"""

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from importlib.resources import files
from typing import Any

import yaml

from jax_selftrain.stats.estimators import Estimate
from jax_selftrain.study.measure_names import MAIN_EFFECT, display_scale

WIDE, SHOWN, LONG = 9, 7, 30
"""Columns beyond which a table is folded, columns that are shown then, and rows beyond which all is folded."""
Results = Mapping[str, Any]
Record = Mapping[str, Any]
Records = Sequence[Record]
Cell = str | int | float | Estimate | None
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
    titles = {"before": f"{title}, before", "after": "after", "change": "change"}
    path = (key,) if path is None else path
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

    def to_html(self, limit: int | None = None) -> str:
        """Return an HTML element; estimates have their interval below.

        `limit` is the number of columns to show, from the first.
        """
        rows = [row[:limit] for row in self.rows]
        columns = self.columns[:limit]
        is_text = [any(isinstance(row[i], str) for row in rows) for i in range(len(columns))]
        kinds = [' class="text"' if text else "" for text in is_text]
        head = "".join(
            f'<th scope="col"{kind}>{escape(c.title or c.key.replace("_", " "))}</th>'
            for c, kind in zip(columns, kinds, strict=True)
        )
        width = " wide" * (len(columns) > WIDE)
        caption = escape(self.caption)
        lines = [
            f'<p class="caption">{caption}</p>\n<div class="scroll{width}" tabindex="0"><table aria-label="{caption}">'
        ]
        lines.append(f"<thead><tr>{head}</tr></thead>")
        for i, row in enumerate(rows):
            lines.append('<tr class="total">' if i < self.totals else "<tr>")
            lines += [
                f"<td{kind}>{_cell_html(cell, column)}</td>"
                for cell, column, kind in zip(row, columns, kinds, strict=True)
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


def figure_html(figure: tuple[str, str], caption: str) -> str:
    """Return an HTML element; the caption is also the alternative text."""
    text = escape(caption)
    image = f'<div role="img" aria-label="{text}">\n{figure[1]}</div>'
    return f"<figure>\n{image}\n<figcaption>{text}</figcaption>\n</figure>"


@dataclass
class Chapter:
    """One chapter of the page, filled in the order of its parts."""

    title: str
    html: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: dict[str, str] = field(default_factory=dict)
    """SVG text by name."""

    @property
    def anchor(self) -> str:
        """Id of its element in the page."""
        return slugify(self.title.lower())

    def add_table(self, table: Table, *, folded: bool = False) -> None:
        """Add a table unless it is empty; a click opens folded ones.

        Of a wide table, the first columns are shown, and all of them are folded.
        """
        if not table.records:
            return
        self.tables.append(table)
        summary, size = escape(table.caption), len(table.columns)
        folded = folded or len(table.records) > LONG
        if size > WIDE and not folded:
            self.html.append(table.to_html(SHOWN))
            summary, folded = f"{summary}: all {size} columns", True
        html = table.to_html()
        self.html.append(f'<details class="table"><summary>{summary}</summary>\n{html}\n</details>' if folded else html)

    def add_figure(self, figure: tuple[str, str], caption: str) -> None:
        """Add a figure, as (name, SVG), with its caption (plain text)."""
        self.figures[figure[0]] = figure[1]
        self.html.append(figure_html(figure, caption))

    def add_note(self, text: str) -> None:
        """Add a paragraph in small print (plain text)."""
        self.html.append(f'<p class="note">{escape(text)}</p>')


def select_matrix(results: Results) -> list[Record]:
    """Return the effects of all sources on all students."""
    return [one for one in results["effects"] if one["treatment"] == f"{MAIN_EFFECT}{one['source']}"]


def list_treatments(results: Results) -> list[str]:
    """Return all treatments, in order."""
    return list(dict.fromkeys(one["treatment"] for one in results["effects"]))


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


def format_contrast(contrast: str) -> str:
    """Return a difference with a minus sign."""
    return contrast.replace(" - ", " − ")


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


def _parse_crossed(entry: Record, measure: str) -> Estimate | None:
    return entry["crossed"] and parse_estimate(entry["crossed"], measure)


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
    if any(one["measures"][measures[0]]["crossed"] for one in effects):
        columns.append(
            Column(
                "crossed", f"{format_measure(measures[0])}, over seeds and items", get_decimals(measures[0]),
                signed=True, path=("measures", measures[0]), convert=partial(_parse_crossed, measure=measures[0]),
            )
        )  # fmt: skip
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


def average_curves(curves: Sequence[Sequence[float]]) -> list[float]:
    """Average curves of several seeds, aligned at both ends.

    With epochs, seeds have other numbers of steps: the average has the length of the shortest, and ends at the mean of
    the ends.
    """
    shortest = min(map(len, curves))
    aligned = [[*curve[: shortest - 1], curve[-1]] for curve in curves]
    return [sum(values) / len(values) for values in zip(*aligned, strict=True)]
