"""The patterns of families map tensors to parameters and back."""

import numpy as np
import pytest

from jax_selftrain.hub.families import FAMILIES, Pattern

SIZES = {"d": 5, "g": 3, "r": 2, "k": 4, "f": 6, "v": 7, "p": 8}
PATTERNS = sorted({row.pattern.template for family in FAMILIES.values() for row in family.rows})


@pytest.mark.parametrize("text", PATTERNS)
def test_a_layer_is_a_view_of_the_tensor(text: str):
    pattern = Pattern(text)
    shape = pattern.file_shape(SIZES)
    tensor = np.arange(np.prod(shape)).reshape(shape)
    layer = pattern.view(tensor, SIZES)
    assert layer.shape == tuple(SIZES[axis] for axis in text.split("->")[1].split())
    assert np.shares_memory(layer, tensor)
    assert len(np.unique(layer)) == layer.size


@pytest.mark.parametrize("text", PATTERNS)
def test_writing_is_the_inverse_of_reading(text: str):
    pattern = Pattern(text)
    tensor = np.zeros(pattern.file_shape(SIZES))
    layer = np.random.default_rng(0).standard_normal(pattern.view(tensor, SIZES).shape)
    pattern.view(tensor, SIZES)[...] = layer
    np.testing.assert_array_equal(pattern.view(tensor, SIZES), layer)
    assert np.count_nonzero(tensor) == layer.size


def test_neox_fuses_query_key_and_value_as_heads_3_head_width():
    heads, width, k = SIZES["g"], SIZES["d"], SIZES["k"]
    fused = np.random.default_rng(1).standard_normal((heads * 3 * k, width))
    apart = fused.reshape(heads, 3, k, width)
    sizes = SIZES | {"r": 1}
    for slot, text in enumerate(["(g r 0of3 k) d -> d g r k", "(g 1of3 k) d -> d g k", "(g 2of3 k) d -> d g k"]):
        found = Pattern(text).view(fused, sizes)
        np.testing.assert_array_equal(found, apart[:, slot].transpose(2, 0, 1).reshape(found.shape))
