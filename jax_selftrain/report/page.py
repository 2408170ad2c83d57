"""What the report is put together from: chapters, framed figures, remarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files

from jax_selftrain.report.tables import Table


@dataclass(frozen=True)
class Chapter:
    """One chapter of the page, and those of its tables and figures that are also files."""

    title: str
    html: str
    tables: tuple[Table, ...] = ()
    figures: Mapping[str, str] = field(default_factory=dict)
    """SVG text by name."""


def figure_html(svg: str, caption: str) -> str:
    """A figure with its caption (plain text), as HTML."""
    return f"<figure>\n{svg}<figcaption>{escape(caption)}</figcaption>\n</figure>\n"


def note_html(text: str) -> str:
    """A paragraph in small print (plain text), as HTML."""
    return f'<p class="note">{escape(text)}</p>\n'


def render_page(title: str, kind: str, subtitle: str, summary: str, chapters: Sequence[Chapter]) -> str:
    """The whole report: headline, one line that says what it is, a paragraph and the first screen (HTML), chapters."""
    style = files("jax_selftrain.report").joinpath("report.css").read_text(encoding="utf-8")
    body = "\n".join(f"<section>\n<h2>{escape(one.title)}</h2>\n{one.html}\n</section>" for one in chapters)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n<header>\n"
        f'<h1>{escape(title)}</h1>\n<p class="kind">{escape(kind)}</p>\n<p class="lead">{subtitle}</p>\n</header>\n'
        f"{summary}\n{body}\n</main>\n</body>\n</html>\n"
    )
