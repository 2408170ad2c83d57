"""Parts of the page: chapters, figures with captions, notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files

from jax_selftrain.report.tables import Table


@dataclass
class Chapter:
    """One chapter of the page, filled in the order of its parts."""

    title: str
    html: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: dict[str, str] = field(default_factory=dict)
    """SVG text by name."""

    def add_table(self, table: Table, *, folded: bool = False) -> None:
        """Add a table; a folded one opens by a click."""
        self.tables.append(table)
        html = table.to_html()
        caption = escape(table.caption)
        self.html.append(f"<details><summary>{caption}</summary>\n{html}\n</details>" if folded else html)

    def add_figure(self, figure: tuple[str, str], caption: str) -> None:
        """Add a figure, as (name, SVG), with its caption (plain text)."""
        name, svg = figure
        self.figures[name] = svg
        self.html.append(f"<figure>\n{svg}<figcaption>{escape(caption)}</figcaption>\n</figure>")

    def add_note(self, text: str) -> None:
        """Add a paragraph in small print (plain text)."""
        self.html.append(f'<p class="note">{escape(text)}</p>')


@dataclass(frozen=True)
class Summary:
    """The first screen, in HTML."""

    kind: str
    lead: str
    cards: Sequence[tuple[str, str, str]]
    """Title (plain text), value and sentence of each answer."""
    caution: str


def render_page(title: str, summary: Summary, chapters: Sequence[Chapter]) -> str:
    """Return the whole page as HTML."""
    style = files("jax_selftrain.report").joinpath("report.css").read_text(encoding="utf-8")
    cards = "\n".join(
        f'<div class="card"><h3>{escape(title)}</h3>\n<p class="values">{values}</p>\n<p>{text}</p></div>'
        for title, values, text in summary.cards
    )
    parts = [(escape(chapter.title), "\n".join(chapter.html)) for chapter in chapters]
    body = "\n".join(f"<section>\n<h2>{title}</h2>\n{html}\n</section>" for title, html in parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n<header>\n"
        f'<h1>{escape(title)}</h1>\n<p class="kind">{summary.kind}</p>\n<p class="lead">{summary.lead}</p>\n</header>\n'
        f'<div class="cards">\n{cards}\n</div>\n<p class="caution">{summary.caution}</p>\n'
        f"{body}\n</main>\n</body>\n</html>\n"
    )
