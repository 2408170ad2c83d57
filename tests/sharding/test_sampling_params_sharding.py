"""Tests of `sampling_params` on several devices."""

from dataclasses import replace

import jax
import numpy as np
from sampling_reference import random_logits

from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.sampling.sampling_params import (
    SamplingParams,
    warp_logits,
)

PLAIN = SamplingParams(start_ids=(0,), stop_ids=(), max_tokens=1)


def test_truncation_is_the_same_on_any_mesh():
    sampling_params = replace(PLAIN, temperature=0.8, top_k=50, top_p=0.9, min_p=0.02)
    logits = random_logits(8, 200, 2.0)
    expected = np.asarray(jax.jit(warp_logits, static_argnums=1)(logits, sampling_params))
    mesh = make_mesh("data=2,model=4")
    with mesh_context(mesh):
        placed = jax.device_put(logits, jax.NamedSharding(mesh, jax.P("data", "model")))
        got = jax.jit(warp_logits, static_argnums=1)(placed, sampling_params)
    np.testing.assert_array_equal(got, expected)
