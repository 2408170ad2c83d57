"""The report's figures, as SVG text that is the same bytes for the same numbers.

matplotlib's SVGs carry a date, random ids and a library version; all three are removed here (a fixed hash salt, no
metadata), and ids get the figure's name as prefix so that several figures can stand in one page. Text stays text and
takes the page's font. Before is always a hollow gray mark and after a filled blue one: the pair stays apart in black
and white and for color-blind readers (colors from Okabe and Ito's palette).
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
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
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
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


def before_and_after(
    name: str,
    labels: Sequence[str],
    before: Sequence[Estimate],
    after: Sequence[Estimate],
    change: Sequence[Estimate],
    *,
    value_label: str,
    change_label: str,
    marks: Sequence[float | None] | None = None,
    mark_label: str = "",
) -> str:
    """Two panels, a row per label: the values before and after, and their paired change, all with intervals.

    `marks` are reference values (for instance the accuracy of guessing), one per label or None.
    """

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        rows = [-float(i) for i in range(len(labels))]
        for i, row in enumerate(rows):
            _whisker(left, before[i], row + 0.13, BEFORE, filled=False, label="before" if i == 0 else None)
            _whisker(left, after[i], row - 0.13, AFTER, filled=True, label="after" if i == 0 else None)
            _whisker(right, change[i], row, INK, filled=True)
        points = [(mark, row) for mark, row in zip(marks or (), rows, strict=False) if mark is not None]
        if points:
            left.scatter(*zip(*points, strict=True), marker="|", s=90, color=ACCENT, label=mark_label, zorder=1)
        left.set_yticks(rows, labels)
        left.set_ylim(rows[-1] - 0.6, 0.6)
        left.set_xlabel(value_label)
        right.axvline(0, color=ACCENT, linewidth=1, zorder=0)
        right.set_xlabel(change_label)
        for axes in (left, right):
            axes.tick_params(axis="y", length=0)
        _legend_above(left)

    return _svg(name, 0.95 + 0.36 * len(labels), draw)


def training_curve(name: str, steps: Sequence[int], loss: Sequence[float], rate: Sequence[float]) -> str:
    """Training loss (nats per token) and learning rate at each logged step."""

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        mark = "." if len(steps) < 40 else None
        left.plot(steps, loss, color=AFTER, linewidth=1.3, marker=mark)
        left.set(xlabel="optimizer step", ylabel="loss on the corpus\n(nats per token)")
        right.plot(steps, rate, color=INK, linewidth=1.3, marker=mark)
        right.set(xlabel="optimizer step", ylabel="learning rate")
        right.set_ylim(bottom=0)
        right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))

    return _svg(name, 2.7, paint)


Series = Sequence[tuple[str, Sequence[float]]]
"""Labelled rows of values."""


def curves(name: str, steps: Sequence[int], panels: Sequence[tuple[str, Series]], *, best: int | None = None) -> str:
    """One panel per kind of measure (axis label, lines by file) against the step; `best` is the place of one step."""

    def paint(figure: Figure) -> None:
        for axes, (label, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            if len(lines) > len(_PALETTE):
                for _, values in lines:
                    axes.plot(steps, values, color=BEFORE, linewidth=0.6)
                mean = [sum(at) / len(lines) for at in zip(*(values for _, values in lines), strict=True)]
                lines = [(f"average of {len(lines)}", mean)]
            for i, (file, values) in enumerate(lines):
                axes.plot(steps, values, color=_PALETTE[i], marker="o", markersize=3, linewidth=1.3, label=file)
            if best is not None:
                axes.axvline(steps[best], color=ACCENT, linewidth=1, zorder=0)
            axes.set(xlabel="optimizer step", title=label)
            axes.legend(fontsize=7.5)

    return _svg(name, 2.6, paint)


def loss_vs_memorization(
    name: str, steps: Sequence[int], horizontal: Series, vertical: Series, *, x_label: str, best: int | None = None
) -> str:
    """One panel per vertical measure: its path over training against each horizontal one, with some steps named."""

    def paint(figure: Figure) -> None:
        named = sorted({0, len(steps) // 2, len(steps) - 1, *([] if best is None else [best])})
        for axes, (label, height) in zip(figure.subplots(1, len(vertical), squeeze=False)[0], vertical, strict=True):
            for i, (file, place) in enumerate(horizontal):
                color = _PALETTE[i % len(_PALETTE)]
                axes.plot(place, height, color=color, marker=".", linewidth=1.1, label=file)
                axes.plot(place[:1], height[:1], "o", color=color, markerfacecolor="white", markersize=6.5)
                axes.plot(place[-1:], height[-1:], "o", color=color, markersize=6.5)
                for at in named:
                    axes.annotate(
                        f"{steps[at]:,}", (place[at], height[at]), (4, 4), textcoords="offset points", fontsize=7.5
                    )
                if best is not None:
                    axes.plot(place[best], height[best], "o", color=ACCENT, markerfacecolor="none", markersize=10)
            axes.set(xlabel=x_label, ylabel=label)
            axes.locator_params(axis="x", nbins=5)
            axes.legend(fontsize=7.5)

    return _svg(name, 2.9, paint)


def dot_plot(
    name: str, labels: Sequence[str], means: Sequence[Estimate], seeds: Sequence[Sequence[float]], *, label: str
) -> str:
    """A row per label: the mean over seeds with its interval, and a dot for every seed."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        rows = [-float(i) for i in range(len(labels))]
        for mean, values, row in zip(means, seeds, rows, strict=True):
            axes.plot(values, [row - 0.22] * len(values), "o", color=BEFORE, markersize=3.5, alpha=0.8)
            _whisker(axes, mean, row, AFTER, filled=True)
        axes.axvline(0, color=ACCENT, linewidth=1, zorder=0)
        axes.set_yticks(rows, labels)
        axes.set_ylim(rows[-1] - 0.6, 0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(label)

    return _svg(name, 0.8 + 0.34 * len(labels), paint)


def damage_panels(
    name: str,
    labels: Sequence[str],
    loss: Sequence[float],
    panels: Sequence[tuple[str, float, Sequence[float]]],
    base: float,
    *,
    x_label: str,
) -> str:
    """One panel per measure (axis label, the base's value, each treatment's): against the loss, treatments named."""

    def paint(figure: Figure) -> None:
        for axes, (label, before, values) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            axes.axhline(before, color=RULE, linewidth=1, zorder=0)
            axes.plot([base], [before], "X", color=INK, markersize=8, zorder=3)
            for i, (treatment, x, y) in enumerate(zip(labels, loss, values, strict=True)):
                color, mark = _PALETTE[i % len(_PALETTE)], _MARKS[i // len(_PALETTE) % len(_MARKS)]
                axes.plot([x], [y], mark, color=color, markersize=6, label=treatment)
            axes.set(xlabel=x_label, ylabel=label)
            axes.locator_params(axis="x", nbins=5)
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=7.5)

    return _svg(name, 3.0 + 0.18 * -(-len(labels) // 3), paint)


LineSeries = Sequence[Sequence[float]]
"""A line for each label."""
Trajectory = tuple[Sequence[float], Sequence[float]]
"""Points of a line: horizontal, vertical."""


def training_trajectories(
    name: str, labels: Sequence[str], panels: Sequence[tuple[str, str, Sequence[Trajectory]]]
) -> str:
    """One panel per pair of measures (both axis labels, a path for each label): from the hollow start to the end."""

    def paint(figure: Figure) -> None:
        for axes, (x_label, y_label, lines) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            for i, (treatment, (x, y)) in enumerate(zip(labels, lines, strict=True)):
                color, mark = _PALETTE[i % len(_PALETTE)], _MARKS[i // len(_PALETTE) % len(_MARKS)]
                axes.plot(x, y, color=color, linewidth=1, alpha=0.8)
                axes.plot(x[-1:], y[-1:], mark, color=color, markersize=5.5, label=treatment)
                axes.plot(x[:1], y[:1], "o", color=INK, markerfacecolor="white", markersize=6, zorder=3)
            axes.set(xlabel=x_label, ylabel=y_label)
            axes.locator_params(axis="x", nbins=4)
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=7.5)

    return _svg(name, 2.8 + 0.18 * -(-len(labels) // 3), paint)


def n_p_discoverability_by_treatment(
    name: str, labels: Sequence[str], draws: Sequence[int], panels: Sequence[tuple[str, LineSeries]]
) -> str:
    """One panel per probability (its label, a line for each treatment): percentage of sequences against draws."""

    def paint(figure: Figure) -> None:
        for axes, (label, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for i, (treatment, values) in enumerate(zip(labels, lines, strict=True)):
                color, mark = _PALETTE[i % len(_PALETTE)], _MARKS[i // len(_PALETTE) % len(_MARKS)]
                axes.plot(draws, values, color=color, marker=mark, markersize=3.5, linewidth=1, label=treatment)
            axes.set_xscale("log")
            axes.set_ylim(bottom=0)
            axes.set(xlabel="draws n", title=label)
        figure.axes[0].set_ylabel("% of sequences found")
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=7.5)

    return _svg(name, 2.6 + 0.18 * -(-len(labels) // 3), paint)


def length_histogram(name: str, edges: Sequence[float], stopped: Sequence[int], cut: Sequence[int]) -> str:
    """How long the samples are: those that a stop token ended, and on top of them those that the limit cut."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        widths = [right - left for left, right in pairwise(edges)]
        bars = partial(axes.bar, edges[:-1], width=widths, align="edge", edgecolor="white", linewidth=0.4)
        bars(stopped, color=AFTER, label="ended by a stop token")
        bars(cut, bottom=stopped, color="#e69f00", hatch="////", label="cut at the limit")
        axes.set(xlabel="tokens in a sample", ylabel="samples")
        axes.grid(axis="x", visible=False)
        _legend_above(axes)

    return _svg(name, 2.5, paint)


def n_p_discoverability(
    name: str, draws: Sequence[int], before: Sequence[float], after: Sequence[float], p: str
) -> str:
    """Percentage of sequences that n independent draws produce with probability at least p, against n."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(draws, before, color=BEFORE, marker="o", markerfacecolor="white", markersize=5, label="before")
        axes.plot(draws, after, color=AFTER, marker="o", markersize=5, label="after")
        axes.set_xscale("log")
        axes.set(xlabel="draws n", ylabel=f"% found with\nprobability ≥ {p}")
        axes.set_ylim(0, 1.08 * max(1, *before, *after))
        _legend_above(axes)

    return _svg(name, 2.6, paint)


def _svg(name: str, height: float, paint: Callable[[Figure], None], *, width: float = 7.6) -> str:
    """Paint a figure of this size (inches) under the report's style, whatever the user's own matplotlib style is."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        settings: Any = {**_STYLE, "svg.hashsalt": name}
        matplotlib.rcParams.update(settings)
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return _inline_svg(text.getvalue(), name)


def _inline_svg(svg: str, name: str) -> str:
    """The `<svg>` element alone, with ids of its own, without metadata, scaling with the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    return svg.strip() + "\n"


def _whisker(axes: Axes, estimate: Estimate, row: float, color: str, *, filled: bool, label: str | None = None) -> None:
    if estimate.low is not None and estimate.high is not None:
        axes.plot([estimate.low, estimate.high], [row, row], color=color, linewidth=1.5, solid_capstyle="round")
    face = color if filled else "white"
    axes.plot([estimate.value], [row], "o", color=color, markerfacecolor=face, markersize=5.5, label=label)


def _legend_above(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, borderaxespad=0.1, handletextpad=0.3)
