"""What the report is put together from: chapters, framed figures, remarks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape

from jax_selftrain.study.tables import Table


@dataclass(frozen=True)
class Chapter:
    """One chapter of the page, and those of its tables and figures that are also files."""

    title: str
    html: str
    tables: tuple[Table, ...] = ()
    figures: Mapping[str, str] = field(default_factory=dict)
    """SVG text by name."""


def framed(svg: str, caption: str) -> str:
    """A figure with its caption (plain text), as HTML."""
    return f"<figure>\n{svg}<figcaption>{escape(caption)}</figcaption>\n</figure>\n"


def remark(text: str) -> str:
    """A paragraph in small print (plain text), as HTML."""
    return f'<p class="note">{escape(text)}</p>\n'
