"""Tests of `sampling_params` on several devices."""

from dataclasses import replace

import jax
import numpy as np

from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.sampling.sampling_params import (
    SamplingParams,
    warp_logits,
)

PLAIN = SamplingParams(start_id=0, stop_ids=(), max_tokens=1)


def _logits(rows: int = 32, vocab_size: int = 200, scale: float = 2.0) -> np.ndarray:
    return scale * np.random.default_rng(0).standard_normal((rows, vocab_size), dtype=np.float32)


def test_truncation_is_the_same_on_any_mesh():
    sampling_params = replace(PLAIN, temperature=0.8, top_k=50, top_p=0.9, min_p=0.02)
    logits = _logits(rows=8)
    expected = np.asarray(jax.jit(warp_logits, static_argnums=1)(logits, sampling_params))
    mesh = make_mesh("data=2,model=4")
    with mesh_context(mesh):
        placed = jax.device_put(logits, jax.NamedSharding(mesh, jax.P("data", "model")))
        got = jax.jit(warp_logits, static_argnums=1)(placed, sampling_params)
    np.testing.assert_array_equal(got, expected)
