"""The heat map shows each window in its cell."""

import base64
import io
import re
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pyarrow as pa
import pytest

from jax_selftrain.report.heat_map import FLOOR, MAX_CELLS, plot_heat_map, shrink_cells

RESULT = {"prefix": 50, "stride": 10}


def make_windows(counts: list[int], logprob: np.ndarray, texts: int = 1) -> pa.Table:
    """Windows of documents with these numbers of windows."""
    document = np.repeat(np.arange(len(counts)), counts)
    begin = np.concatenate([50 + 10 * np.arange(count) for count in counts])
    text = document // 2 if texts > 1 else np.zeros_like(document)
    names = pa.DictionaryArray.from_arrays(text.astype(np.int32), [f"text {i}" for i in range(texts)])
    return pa.table({"text": names, "document": document - 2 * text, "begin": begin, "logprob": logprob})


def draw_cells(svg: str) -> list[np.ndarray]:
    """Return the pixels [rows, columns, RGBA] of the maps, without the color bars."""
    images = [base64.b64decode(data) for data in re.findall(r'"data:image/png;base64,([^"]+)"', svg)]
    pixels = [matplotlib.image.imread(io.BytesIO(image)) for image in images]
    return [image for image in pixels if max(image.shape) <= 10]  # a bar is longer


def test_one_document_is_folded_into_rows():
    logprob = np.full(33, -200.0)
    logprob[[0, 27]] = 0.0, FLOOR * np.log(10) / 2
    svg = plot_heat_map(RESULT, make_windows([33], logprob))
    (cells,) = draw_cells(svg)
    assert cells.shape[:2] == (4, 10)
    ink = 1 - cells[..., :3].mean(axis=2)
    light = ink[0, 1]
    assert ink[0, 0] > ink[2, 7] > light  # p_z = 1, and half of the scale
    others = np.delete(ink.reshape(-1)[:33], [0, 27])
    np.testing.assert_array_equal(others, light)
    assert (cells[3, 3:, 3] == 0).all()  # after the last window: transparent
    ElementTree.fromstring(svg)
    assert plot_heat_map(RESULT, make_windows([33], logprob)) == svg


@pytest.mark.parametrize("texts", [1, 2])
def test_several_documents_have_one_row_each_and_a_base_adds_the_change(texts):
    logprob = np.linspace(-20, -1, 12)
    table = make_windows([5, 1, 6], logprob, texts)
    (cells,) = draw_cells(plot_heat_map(RESULT, table))
    assert cells.shape[:2] == (3, 6)
    assert (cells[..., 3] > 0).sum(axis=1).tolist() == [5, 1, 6]
    base = table["logprob"].to_numpy() + np.where(np.arange(12) == 2, 3.0, 0.0)
    svg = plot_heat_map(RESULT | {"base": {}}, table.append_column("base logprob", pa.array(base)))
    first, change = draw_cells(svg)
    np.testing.assert_array_equal(first, cells)
    colored = np.ptp(change[..., :3], axis=2) > 0.5
    assert np.argwhere(colored).tolist() == [[0, 2]]
    red, _, blue, _ = change[0, 2]
    assert red > blue  # the model has the lower probability
    assert "change of log10 p_z" in svg


def test_too_many_cells_are_merged():
    cells = np.full((3, MAX_CELLS + 3), np.nan)
    cells[0, :4] = 1.0, 5.0, np.nan, 7.0
    largest, mean = shrink_cells(cells, reduce_mean=False), shrink_cells(cells, reduce_mean=True)
    assert largest.shape == mean.shape == (3, (MAX_CELLS + 4) // 2)
    assert largest[0, :2].tolist() == [5.0, 7.0]
    assert mean[0, :2].tolist() == [3.0, 7.0]
    assert np.isnan(largest).sum() == np.isnan(mean).sum() == largest.size - 2
