"""Deterministic SVG figures of the report.

matplotlib's SVGs carry a date, random ids and a library version. A fixed hash salt replaces the ids, the metadata is
removed, and ids get the figure's name as prefix so that several figures fit in one page. Before is a hollow gray mark
and after a filled blue one, which works in black and white; colors are from Okabe and Ito's palette.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jax_selftrain.stats.estimators import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PALETTE = ("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#24303a")
BEFORE, AFTER, ACCENT, INK, RULE = "#6b7680", "#0072b2", "#d55e00", "#24303a", "#d5dbe0"
_MARKS = ("o", "s", "^", "D", "v", "P")
_STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9edf0",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


Line = tuple[Sequence[float], Sequence[float]]
"""Points of a line: horizontal, vertical."""
Panel = tuple[str, str, Mapping[str, Line]]
"""Labels of both axes, and lines by label."""


def plot_before_and_after(
    name: str,
    labels: Sequence[str],
    estimates: Sequence[Sequence[Estimate]],
    *,
    value_label: str,
    change_label: str,
    marks: Sequence[float | None] = (),
    mark_label: str = "",
) -> str:
    """Plot values before and after, and their paired change, in two panels.

    Args:
        name: name of the figure.
        labels: one for each row.
        estimates: (before, after, change) of each row.
        value_label, change_label: axis labels.
        marks: a reference value (for instance the accuracy by chance) or None for each row.
        mark_label: label of the reference values.
    """

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        rows = [-float(i) for i in range(len(labels))]
        for row, (before, after, change) in zip(rows, estimates, strict=True):
            _draw_estimate(left, before, row + 0.13, BEFORE, filled=False, label="before" if row == 0 else None)
            _draw_estimate(left, after, row - 0.13, AFTER, filled=True, label="after" if row == 0 else None)
            _draw_estimate(right, change, row, INK, filled=True)
        points = [(mark, row) for mark, row in zip(marks, rows, strict=False) if mark is not None]
        if points:
            left.scatter(*zip(*points, strict=True), marker="|", s=90, color=ACCENT, label=mark_label, zorder=1)
        _label_rows(left, rows, labels)
        left.set_xlabel(value_label)
        right.axvline(0, color=ACCENT, linewidth=1, zorder=0)
        right.tick_params(axis="y", length=0)
        right.set_xlabel(change_label)
        left.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, borderaxespad=0.1, handletextpad=0.3)

    return _render_svg(name, 0.95 + 0.36 * len(labels), draw)


def plot_effects(
    name: str, labels: Sequence[str], means: Sequence[Estimate], seeds: Sequence[Sequence[float]], *, label: str
) -> str:
    """Plot a mean, its interval and the seeds for each label."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        rows = [-float(i) for i in range(len(labels))]
        for mean, values, row in zip(means, seeds, rows, strict=True):
            axes.plot(values, [row - 0.22] * len(values), "o", color=BEFORE, markersize=3.5, alpha=0.8)
            _draw_estimate(axes, mean, row, AFTER, filled=True)
        axes.axvline(0, color=ACCENT, linewidth=1, zorder=0)
        _label_rows(axes, rows, labels)
        axes.set_xlabel(label)

    return _render_svg(name, 0.8 + 0.34 * len(labels), draw)


def plot_curves(name: str, panels: Sequence[Panel]) -> str:
    """Plot lines; many lines are drawn in gray with their mean."""

    def draw(axes: Axes, lines: Mapping[str, Line], styles: Mapping[str, Mapping[str, Any]]) -> None:
        if len(lines) > len(_PALETTE):
            for x, y in lines.values():
                axes.plot(x, y, color=BEFORE, linewidth=0.6)
            mean = [sum(values) / len(lines) for values in zip(*(y for _, y in lines.values()), strict=False)]
            axes.plot(next(iter(lines.values()))[0][: len(mean)], mean, color=AFTER, label=f"mean of {len(lines)}")
            return
        for label, (x, y) in lines.items():
            axes.plot(x, y, color=styles[label]["color"], marker="." if len(x) < 40 else None, label=label)

    return _render_panels(name, 2.6, panels, draw)


def plot_damage(name: str, panels: Sequence[Panel]) -> str:
    """Plot points; the line "base" is a cross with a horizontal rule."""

    def draw(axes: Axes, lines: Mapping[str, Line], styles: Mapping[str, Mapping[str, Any]]) -> None:
        for label, (x, y) in lines.items():
            if label == "base":
                axes.axhline(y[0], color=RULE, linewidth=1, zorder=0)
                axes.plot(x, y, "X", color=INK, markersize=8, zorder=3, label=label)
            else:
                axes.plot(x, y, **styles[label], linestyle="", markersize=6, label=label)
        axes.locator_params(axis="x", nbins=5)

    return _render_panels(name, 3.0, panels, draw)


def plot_trajectories(name: str, panels: Sequence[Panel]) -> str:
    """Plot paths from a hollow start to a filled end."""

    def draw(axes: Axes, lines: Mapping[str, Line], styles: Mapping[str, Mapping[str, Any]]) -> None:
        for label, (x, y) in lines.items():
            axes.plot(x, y, color=styles[label]["color"], linewidth=1, alpha=0.8)
            axes.plot(x[-1:], y[-1:], **styles[label], linestyle="", markersize=5.5, label=label)
            axes.plot(x[:1], y[:1], "o", color=INK, markerfacecolor="white", markersize=6, zorder=3)
        axes.locator_params(axis="x", nbins=4)

    return _render_panels(name, 2.8, panels, draw)


def plot_discoverability(name: str, panels: Sequence[Panel]) -> str:
    """Plot percentages of extracted sequences against numbers of samples."""

    def draw(axes: Axes, lines: Mapping[str, Line], styles: Mapping[str, Mapping[str, Any]]) -> None:
        for label, (x, y) in lines.items():
            axes.plot(x, y, **styles[label], markersize=3.5, linewidth=1, label=label)
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)

    return _render_panels(name, 2.6, panels, draw)


def _render_panels(name: str, height: float, panels: Sequence[Panel], draw: Callable[..., None]) -> str:
    """Render panels side by side with one legend."""
    labels = dict.fromkeys(label for _, _, lines in panels for label in lines)
    styles = {
        label: {"color": _PALETTE[i % len(_PALETTE)], "marker": _MARKS[i // len(_PALETTE) % len(_MARKS)]}
        for i, label in enumerate(labels)
    }

    def draw_all(figure: Figure) -> None:
        handles: dict[str, Any] = {}
        for axes, (x_label, y_label, lines) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            draw(axes, lines, styles)
            axes.set(xlabel=x_label, ylabel=y_label)
            handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=7.5)

    return _render_svg(name, height + 0.18 * -(-min(len(labels), 18) // 3), draw_all)


def _render_svg(name: str, height: float, draw: Callable[[Figure], None], *, width: float = 7.6) -> str:
    """Render a figure (size in inches) in the report's style alone."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        settings: Any = {**_STYLE, "svg.hashsalt": name}
        matplotlib.rcParams.update(settings)
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return _inline_svg(text.getvalue(), name)


def _inline_svg(svg: str, name: str) -> str:
    """Return the `<svg>` element without metadata and with prefixed ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    return svg.strip() + "\n"


def _draw_estimate(
    axes: Axes, estimate: Estimate, row: float, color: str, *, filled: bool, label: str | None = None
) -> None:
    if estimate.low is not None and estimate.high is not None:
        axes.plot([estimate.low, estimate.high], [row, row], color=color, linewidth=1.5, solid_capstyle="round")
    face = color if filled else "white"
    axes.plot([estimate.value], [row], "o", color=color, markerfacecolor=face, markersize=5.5, label=label)


def _label_rows(axes: Axes, rows: Sequence[float], labels: Sequence[str]) -> None:
    axes.set_yticks(rows, labels)
    axes.set_ylim(rows[-1] - 0.6, 0.6)
    axes.tick_params(axis="y", length=0)
