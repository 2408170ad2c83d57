"""Render a page whose sentences and tables are computed from CSV files.

    python tests/published_page.py docs/micro-world docs/micro-world/README.md

writes the file from `page.template.txt` in the folder. An expression in
double braces is evaluated with the functions of `Page` and those that a block in `{% %}` defines; its value replaces
it. A sentence without a number has a `require`, which fails if the tables contradict it.
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

TEMPLATE = "page.template.txt"
EXPRESSION, DEFINITIONS = re.compile(r"\{\{(.+?)\}\}", re.DOTALL), re.compile(r"\{%(.+?)%\}\n", re.DOTALL)

Row = dict[str, str]


class Page:
    """Functions of a template."""

    def __init__(self, folder: Path):
        self.folder = folder

    def rows(self, table: str, **where: str) -> list[Row]:
        """Return the rows of `TABLE.csv` with these values."""
        with (self.folder / f"{table}.csv").open(encoding="utf-8", newline="") as file:
            return [row for row in csv.DictReader(file) if where.items() <= row.items()]

    def row(self, table: str, **where: str) -> Row:
        """Return the only such row."""
        (row,) = self.rows(table, **where)
        return row

    def value(self, table: str, column: str, **where: str) -> float:
        return float(self.row(table, **where)[column])

    def effect(self, table: str, column: str, digits: int = 1, scale: float = 1.0, **where: str) -> str:
        """Return a change with its interval, for instance `−5.0 [−8.3, −1.8]`."""
        return format_effect(self.row(table, **where), column, digits, scale)

    def require(self, holds: object) -> str:
        """Return nothing if it holds."""
        assert holds, "the tables contradict the sentence"
        return ""

    def render(self) -> str:
        """Return the page."""
        names = {name: getattr(self, name) for name in dir(self) if not name.startswith("_")}
        names |= {"format_number": format_number, "format_effect": format_effect}

        def evaluate(match: re.Match[str]) -> str:
            expression = match[1].strip()
            return str(eval(compile(expression, f"{TEMPLATE}: {expression}", "eval"), names))  # the traceback shows it

        text = (self.folder / TEMPLATE).read_text(encoding="utf-8")
        for definitions in DEFINITIONS.findall(text):
            exec(definitions, names)
        return EXPRESSION.sub(evaluate, DEFINITIONS.sub("", text))


def format_number(value: float, digits: int = 1, sign: bool = True) -> str:
    text = f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")
    return re.sub(r"^[+−](?=[0.]+$)", "", text)


def format_effect(row: Row, column: str, digits: int = 1, scale: float = 1.0) -> str:
    if not row[column]:
        return ""
    value, *ends = (row[f"{column}{end}"] for end in ("", "_low", "_high"))
    text = format_number(scale * float(value), digits)
    if "" in ends or ends == [value, value]:
        return text
    return f"{text} [{', '.join(format_number(scale * float(end), digits) for end in ends)}]"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(Page(Path(sys.argv[1])).render(), encoding="utf-8")
