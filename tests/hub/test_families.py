"""The patterns of families map tensors to parameters and back."""

import itertools

import numpy as np
import pytest

from jax_selftrain.hub.families import FAMILIES, Pattern

SIZES = {"d": 5, "g": 3, "r": 2, "k": 4, "f": 6, "v": 7}
PATTERNS = sorted({row.pattern.template for family in FAMILIES.values() for row in family.rows})


def read(pattern: Pattern, tensor: np.ndarray, box: tuple[slice, ...]) -> np.ndarray:
    """Load a box of a tensor in memory."""
    parts = pattern.file_runs(box, SIZES)
    picked = tensor
    for dimension, runs in enumerate(parts):
        picked = np.concatenate([picked.take(range(*run), axis=dimension) for run in runs], axis=dimension)
    return pattern.from_hf(picked, box)


@pytest.mark.parametrize("text", PATTERNS)
def test_any_box_of_a_parameter_is_read_from_the_right_slices(text: str):
    pattern = Pattern(text)
    shape = pattern.file_shape(SIZES)
    tensor = np.arange(np.prod(shape)).reshape(shape)
    ours = [SIZES[axis] for axis in pattern.axes]
    whole = read(pattern, tensor, tuple(slice(0, n) for n in ours))
    assert whole.shape == tuple(ours)
    bounds = [[(0, n), (0, 1), (n - 1, n), (1, n - 1), (0, n // 2)] for n in ours]
    for choice in itertools.product(*bounds):
        if all(start < stop for start, stop in choice):
            box = tuple(slice(*b) for b in choice)
            np.testing.assert_array_equal(read(pattern, tensor, box), whole[box])


@pytest.mark.parametrize("text", PATTERNS)
def test_writing_is_the_inverse_of_reading(text: str):
    pattern = Pattern(text)
    layer = np.random.default_rng(0).standard_normal([SIZES[axis] for axis in pattern.axes])
    tensor = np.zeros(pattern.file_shape(SIZES))
    pattern.to_hf(layer, tensor, SIZES)
    np.testing.assert_array_equal(read(pattern, tensor, tuple(slice(0, n) for n in layer.shape)), layer)


def test_neox_fuses_query_key_and_value_as_heads_3_head_width():
    heads, width, k = SIZES["g"], SIZES["d"], SIZES["k"]
    fused = np.random.default_rng(1).standard_normal((heads * 3 * k, width))
    apart = fused.reshape(heads, 3, k, width)
    sizes = SIZES | {"r": 1}
    for slot, text in enumerate(["(g r 0of3 k) d -> d g r k", "(g 1of3 k) d -> d g k", "(g 2of3 k) d -> d g k"]):
        pattern = Pattern(text)
        box = tuple(slice(0, sizes[axis]) for axis in pattern.axes)
        runs = pattern.file_runs(box, sizes)[0]
        picked = np.concatenate([fused[start:stop] for start, stop in runs])
        expected = apart[:, slot].transpose(2, 0, 1).reshape([sizes[axis] for axis in pattern.axes])
        np.testing.assert_array_equal(pattern.from_hf(picked, box), expected)


def test_contiguous_parts_are_read_in_one_piece():
    pattern = Pattern("(g r k) d -> d g r k")
    box = (slice(0, 5), slice(1, 3), slice(0, 2), slice(0, 4))
    assert pattern.file_runs(box, SIZES) == [[(8, 24)], [(0, 5)]]
