"""The `extract-windows` command: windows over documents, and their heat map.

Each cell is a window, colored by log10 p_z; with a base model, a second panel shows the change. The windows of a single
document are folded into rows. Several documents have one row each, and positions that do not fit share a cell: the
largest p_z, the mean change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from jax_selftrain.config import ExtractWindowsConfig
from jax_selftrain.evals import measure_windows
from jax_selftrain.report.figures import ACCENT, AFTER, INK, render_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLOOR = -12.0
"""Smallest log10 p_z with a color of its own."""
MAX_CELLS = 500
"""Maximum number of rows and of columns."""
ROW_LENGTHS = (10, 20, 50, 100, 200, 500)
"""Windows in a row of a single document."""
LIGHT = "#e9edf0"


def extract_windows(config: ExtractWindowsConfig) -> dict[str, Any]:
    """Measure windows over documents, and write the result with its heat map.

    See `evals.windows.measure_windows`.
    """
    return measure_windows(config, plot_heat_map)


def plot_heat_map(result: Mapping[str, Any], windows: pa.Table) -> str:
    """Plot log10 p_z by document and position as SVG.

    Args:
      result: of `measure_windows`.
      windows: its table of windows.
    """
    prefix, stride = result["prefix"], result["stride"]
    texts = np.asarray(windows["text"].combine_chunks().indices)
    _, document = np.unique(np.stack([texts, windows["document"]]), axis=1, return_inverse=True)
    document = document.reshape(-1)
    position = (windows["begin"].to_numpy() - prefix) // stride
    logprob = windows["logprob"].to_numpy() / np.log(10)
    panels = {"log10 p_z": np.maximum(logprob, FLOOR)}
    if "base" in result:
        panels["change of log10 p_z"] = logprob - windows["base logprob"].to_numpy() / np.log(10)
    is_single = document[-1] == 0
    if is_single:
        length = next((n for n in ROW_LENGTHS if n * n >= 2 * len(document)), ROW_LENGTHS[-1])
        document, position = np.divmod(position, length)
    shape = (int(document.max()) + 1, int(position.max()) + 1)
    height = min(6.0, 0.9 + max(0.8, 0.06 * shape[0]))

    def draw(figure: Figure) -> None:
        (row,) = figure.subplots(1, len(panels), squeeze=False, sharey=True)
        for axes, (label, values) in zip(row, panels.items(), strict=True):
            cells = np.full(shape, np.nan)
            cells[document, position] = values
            is_change = label != "log10 p_z"
            cells = shrink_cells(cells, reduce_mean=is_change)
            width = shape[1] * stride
            columns, rows = (prefix, prefix + width), (shape[0], 0)
            if is_single:
                columns, rows = (0, width), (prefix + shape[0] * width, prefix)
            _draw_cells(axes, cells, (*columns, *rows), label, is_change=is_change)
            axes.set_xlabel("tokens from the start of the row" if is_single else "window begins at token")
        row[0].set_ylabel("row begins at token" if is_single else "document")

    return render_svg("windows", height, draw)[1]


def shrink_cells(cells: np.ndarray, *, reduce_mean: bool) -> np.ndarray:
    """Merge neighboring cells until rows and columns are at most `MAX_CELLS`.

    A merged cell has the maximum or the mean of its values; NaN is no value.
    """
    for axis in (0, 1):
        size = -(-cells.shape[axis] // MAX_CELLS)
        starts = np.arange(0, cells.shape[axis], size)
        if reduce_mean:
            counts = np.add.reduceat(~np.isnan(cells), starts, axis=axis, dtype=np.int64)
            sums = np.add.reduceat(np.nan_to_num(cells), starts, axis=axis)
            cells = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
        else:
            cells = np.fmax.reduceat(cells, starts, axis=axis)
    return cells


def _draw_cells(
    axes: Axes, cells: np.ndarray, extent: tuple[float, float, float, float], label: str, *, is_change: bool
) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    if is_change:
        largest = float(np.nanmax(np.abs(cells))) or 1.0
        colors, low, high = (ACCENT, LIGHT, AFTER), -largest, largest
    else:
        colors, low, high = (LIGHT, AFTER, INK), FLOOR, 0.0
    image = axes.imshow(
        cells,
        cmap=LinearSegmentedColormap.from_list(label, colors),
        vmin=low,
        vmax=high,
        aspect="auto",
        interpolation="none",
        extent=extent,
    )
    axes.grid(visible=False)
    figure = axes.get_figure()
    assert figure is not None
    bar = figure.colorbar(image, ax=axes, label=label, location="top", shrink=0.7)
    bar.ax.locator_params(axis="x", nbins=4)
