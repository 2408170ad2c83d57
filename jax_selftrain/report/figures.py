"""Deterministic SVG figures of the report.

matplotlib's SVGs carry a date, random ids and a library version. A fixed hash salt replaces the ids, the metadata is
removed, and ids get the figure's name as prefix so that several figures fit in one page. Before is a hollow gray mark
and after a filled blue one, which works in black and white; colors are from Okabe and Ito's palette.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_selftrain.report.formatting import Record, format_measure, format_number, parse_change, parse_estimate
from jax_selftrain.stats.estimators import Estimate
from jax_selftrain.study.measure_names import display_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PALETTE = ("#0072b2", "#b34700", "#00795a", "#9c4f86", "#8a6500", "#5b4fb0", "#24303a")
"""Okabe and Ito's colors, darkened: each has a contrast of at least 4.5 to white."""
BEFORE, AFTER, ACCENT, INK, RULE = "#6b7680", "#0072b2", "#d55e00", "#24303a", "#d5dbe0"
_MARKS = ("o", "s", "^", "D", "v", "P")
_LEVELS = ("base", "before")
"""Labels of the model before training."""
_MAX_LABEL = 48
Line = tuple[Sequence[float], ...]
"""Points of a line: horizontal, vertical."""
Panel = tuple[str, str, Mapping[str, Line]]
"""Labels of both axes, and lines by label."""
Styles = Mapping[str, Mapping[str, str]]
"""Color and mark of each label."""
Svg = tuple[str, str]
"""Name of a figure, and its text."""


def clean_label(label: str, longest: int = _MAX_LABEL) -> str:
    """Remove control characters, which SVG excludes; shorten a long label."""
    label = "".join(" " if unicodedata.category(character) in ("Cc", "Cs", "Cn") else character for character in label)
    return label if len(label) <= longest else f"{label[: longest - 21]}…{label[-20:]}"


def plot_before_and_after(
    name: str, entries: Mapping[str, Record], measure: str, label: str, chance: Sequence[float | None] = ()
) -> Svg:
    """Plot values before and after, and their paired change, in two panels.

    Args:
        name: name of the figure.
        entries: estimates `before`, `after` and `change` of a measure, for the label of each row.
        measure: the measure, whose display unit is used.
        label: axis label of the values.
        chance: the value by chance or None for each row.
    """

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        rows = [-float(i) for i in range(len(entries))]
        for row, entry in zip(rows, entries.values(), strict=True):
            before, after, change = (parse_estimate(entry[side], measure) for side in ("before", "after", "change"))
            _draw_estimate(left, before, row + 0.13, BEFORE, filled=False, label="before" if row == 0 else None)
            _draw_estimate(left, after, row - 0.13, AFTER, filled=True, label="after" if row == 0 else None)
            _draw_estimate(right, change, row, INK, filled=True)
        points = [(value, row) for value, row in zip(chance, rows, strict=False) if value is not None]
        if points:
            left.scatter(*zip(*points, strict=True), marker="|", s=90, color=ACCENT, label="chance", zorder=1)
        _label_rows(left, rows, list(entries))
        left.set_xlabel(clean_label(label))
        right.axvline(0, color=ACCENT, linewidth=1, zorder=0)
        right.tick_params(axis="y", length=0)
        right.set_xlabel("change (points)")
        left.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, borderaxespad=0.1, handletextpad=0.3)

    return render_svg(name, 0.95 + 0.36 * len(entries), draw)


def plot_effects(name: str, entries: Mapping[str, Record], measure: str, styles: Styles) -> Svg:
    """Plot mean change, interval and seeds for each label.

    With one seed, the interval is over items. Changes that are much larger than the others are on a symmetric
    logarithmic scale.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        rows = [-float(i) for i in range(len(entries))]
        for (label, entry), row in zip(entries.items(), rows, strict=True):
            values = [display_scale(measure) * value for value in entry["seeds"]]
            if len(values) > 1:
                axes.plot(values, [row - 0.24] * len(values), "o", color=BEFORE, markersize=3.5, alpha=0.8)
            change = parse_change(entry, measure)
            _draw_estimate(axes, change, row, styles[label]["color"], filled=True)
        axes.axvline(0, color=ACCENT, linewidth=1, zorder=0)
        sizes = sorted(abs(parse_change(entry, measure).value) for entry in entries.values())
        median, title = sizes[len(sizes) // 2], f"change: {format_measure(measure)}"
        if sizes[-1] > 6 * median > 0:
            low, high = axes.get_xlim()
            axes.set_xscale("symlog", linthresh=2 * median)
            ticks = [tick for tick in _signed_round_numbers(median, sizes[-1]) if low <= tick <= high]
            axes.set_xticks(ticks, [format_number(tick, 0 if median > 1 else 2, signed=True) for tick in ticks])
            axes.set_xlim(low, high)
            axes.minorticks_off()
            title += f", logarithmic beyond ±{2 * median:.2g}"
        _label_rows(axes, rows, list(entries))
        axes.set_xlabel(clean_label(title, 2 * _MAX_LABEL))

    return render_svg(name, 0.8 + 0.34 * len(entries), draw)


def _signed_round_numbers(smallest: float, largest: float) -> list[float]:
    """Return 0 and ±1, ±3, ±10, ±30, … between two sizes."""
    powers = range(math.floor(math.log10(smallest)), math.ceil(math.log10(largest)) + 1)
    sizes = [factor * 10.0**power for power in powers for factor in (1, 3)]
    sizes = [size for size in sizes if smallest <= size <= largest]
    return [*(-size for size in reversed(sizes)), 0.0, *sizes]


def assign_styles(labels: Iterable[str], treatments: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return color and mark of each label, the same in all figures.

    Args:
      labels: treatments, or labels that begin or end with one.
      treatments: all treatments of the study, in order.
    """
    styles, others = {}, itertools.count(len(treatments))
    by_length = sorted(enumerate(treatments), key=lambda one: -len(one[1]))
    for label in labels:
        if label in _LEVELS:
            styles[label] = {"color": INK, "marker": "X"}
            continue
        found = (i for i, name in by_length if label.startswith(name) or label.endswith(f" {name}"))
        i = next(found, None)
        i = next(others) if i is None else i
        styles[label] = {"color": _PALETTE[i % len(_PALETTE)], "marker": _MARKS[i // len(_PALETTE) % len(_MARKS)]}
    return styles


def plot_panels(name: str, panels: Sequence[Panel], draw: Callable[..., None], treatments: Sequence[str] = ()) -> Svg:
    """Plot panels with one legend; `draw` is one of the functions below."""
    # matplotlib leaves labels that begin with an underscore out of legends.
    panels = [(x, y, {f" {key}" if key[:1] == "_" else key: line for key, line in p.items()}) for x, y, p in panels]
    labels = dict.fromkeys(label for _, _, lines in panels for label in lines)
    styles = assign_styles(labels, treatments)

    def draw_all(figure: Figure) -> None:
        handles: dict[str, Any] = {}
        (row,) = figure.subplots(1, len(panels), squeeze=False)
        for axes, (x_label, y_label, lines) in zip(row, panels, strict=True):
            draw(axes, lines, styles)
            axes.set(xlabel=clean_label(x_label), ylabel=clean_label(y_label))
            handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), map(clean_label, handles), loc="outside lower center", ncols=3, fontsize=7.5)

    return render_svg(name, 2.8 + 0.18 * -(-min(len(labels), 18) // 3), draw_all)


def draw_curves(axes: Axes, lines: Mapping[str, Line], styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw lines; many lines are drawn in gray with their mean."""
    if len(lines) > len(_PALETTE):
        for x, y in lines.values():
            axes.plot(x, y, color=BEFORE, linewidth=0.6)
        mean = [sum(values) / len(lines) for values in zip(*(y for _, y in lines.values()), strict=False)]
        axes.plot(next(iter(lines.values()))[0][: len(mean)], mean, color=AFTER, label=f"mean of {len(lines)}")
        return
    for label, (x, y) in lines.items():
        axes.plot(x, y, color=styles[label]["color"], marker="." if len(x) < 40 else None, label=label)


def draw_damage(axes: Axes, lines: Mapping[str, Line], styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw points; the line "base" is a cross with a horizontal rule."""
    start = 0.0
    for label, (x, y) in lines.items():
        if label == "base":
            axes.axhline(y[0], color=RULE, linewidth=1, zorder=0)
            axes.plot(x, y, "X", color=INK, markersize=8, zorder=3, label=label)
            start = x[0]
        else:
            axes.plot(x, y, **styles[label], linestyle="", markersize=6, label=label)
    away = sorted(abs(x[0] - start) for label, (x, _) in lines.items() if label != "base")
    if away[-1] > 6 * (near := away[len(away) // 2]) > 0:  # one treatment would squeeze the others
        axes.set_xscale("function", functions=_stretch_around(start, near))
    axes.locator_params(axis="x", nbins=4)


def _stretch_around(center: float, unit: float) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return a scale, logarithmic far from a center, and its inverse."""
    import numpy as np

    return lambda x: np.arcsinh((x - center) / unit), lambda y: center + unit * np.sinh(y)


def draw_trajectories(axes: Axes, lines: Mapping[str, Line], styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw paths from a hollow start to a filled end."""
    for label, (x, y) in lines.items():
        axes.plot(x, y, color=styles[label]["color"], linewidth=1, alpha=0.8)
        axes.plot(x[-1:], y[-1:], **styles[label], linestyle="", markersize=5.5, label=label)
        axes.plot(x[:1], y[:1], "o", color=INK, markerfacecolor="white", markersize=6, zorder=3)
    axes.locator_params(axis="x", nbins=4)


def draw_response(axes: Axes, lines: Mapping[str, Line], styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw lines with their intervals, and a rule at no change."""
    axes.axhline(0, color=ACCENT, linewidth=1, zorder=0)
    for label, (x, y, low, high) in lines.items():
        axes.plot(x, y, **styles[label], markersize=4, linewidth=1, label=label)
        axes.vlines(x, low, high, color=styles[label]["color"], linewidth=1.5, alpha=0.6)
    points = [value for x, *_ in lines.values() for value in x]
    if min(points) > 0 and max(points) >= 10 * min(points):
        axes.set_xscale("log")
        axes.set_xticks(sorted(set(points)), [f"{value:g}" for value in sorted(set(points))])
        axes.minorticks_off()


def draw_discoverability(axes: Axes, lines: Mapping[str, Line], styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw percentages of extracted sequences against numbers of samples."""
    for label, (x, y) in lines.items():
        axes.plot(x, y, **styles[label], markersize=3.5, linewidth=1, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")  # the default is TeX
    axes.set_ylim(bottom=0)


def render_svg(name: str, height: float, draw: Callable[[Figure], None]) -> Svg:
    """Render a figure (height in inches) in the report's style alone."""
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with style.context([Path(__file__).with_name("report.mplstyle"), {"svg.hashsalt": name}], after_reset=True):
        figure = Figure(figsize=(7.6, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        text = io.StringIO()
        with warnings.catch_warnings():  # the reader's browser chooses the fonts
            warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return name, re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg).strip() + "\n"


def _draw_estimate(
    axes: Axes, estimate: Estimate, row: float, color: str, *, filled: bool, label: str | None = None
) -> None:
    if estimate.low is not None and estimate.high is not None:
        axes.plot([estimate.low, estimate.high], [row, row], color=color, linewidth=1.5, solid_capstyle="round")
    face = color if filled else "white"
    axes.plot([estimate.value], [row], "o", color=color, markerfacecolor=face, markersize=5.5, label=label)


def _label_rows(axes: Axes, rows: Sequence[float], labels: Sequence[str]) -> None:
    axes.set_yticks(rows, list(map(clean_label, labels)))
    axes.set_ylim(rows[-1] - 0.6, 0.6)
    axes.tick_params(axis="y", length=0)
