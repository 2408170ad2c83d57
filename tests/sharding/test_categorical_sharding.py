"""Tests of `categorical` on several devices."""

import jax
import numpy as np
import pytest
from sampling_reference import draw, first_bits, random_logits

from jax_selftrain.distributed.mesh import make_mesh, mesh_context


@pytest.mark.parametrize(
    ("spec", "rows"), [("data=8,model=1", 64), ("data=2,model=4", 64), ("data=4,model=2", 4), ("data=1,model=8", 1)]
)
def test_the_draw_is_the_same_on_any_mesh(spec, rows):
    logits, words = random_logits(rows, 512, 3.0), first_bits(rows, 512)
    expected = np.asarray(draw(logits, words))
    mesh = make_mesh(spec)
    with mesh_context(mesh):
        logits = jax.device_put(logits, jax.NamedSharding(mesh, jax.P("data", "model")))
        words = jax.device_put(words, jax.NamedSharding(mesh, jax.P("data", None)))
        got = draw(logits, words)
    assert jax.typeof(got).sharding.spec == jax.P("data")
    np.testing.assert_array_equal(got, expected)
