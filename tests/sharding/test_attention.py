"""The TPU kernel, interpreted on a CPU, equals dot-product attention."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.distributed.sharding import ShardingRules, make_sharding_rules, shard_host_array
from jax_selftrain.models.attention import dot_product_attention, splash_attention

B, T, G, R, K = 2, 256, 2, 4, 64


AXES = (("batch", None, "kv_heads", "q_per_kv", None), ("batch", None, "kv_heads", None), ("batch", None))


def sharding_rules_for(spec: str) -> ShardingRules:
    sizes = {"embed": 64, "vocab": 64, "mlp": 64, "kv_heads": G, "q_per_kv": R}
    return make_sharding_rules("tensor", make_mesh(spec), sizes)


def make_operands() -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal(shape, np.float32) for shape in ((B, T, G, R, K), (B, T, G, K), (B, T, G, K)))
    edges = random.integers(1, T, (B, 3, 1))
    segments = (np.arange(T) >= edges).sum(axis=1).astype(np.int32)
    return q, k, v, segments


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    visible = jnp.tril(jnp.ones((T, T), bool)) & (segments[:, :, None] == segments[:, None, :])
    return dot_product_attention(q, k, v, visible, jnp.bfloat16)


def compute_context_and_gradients(rules: ShardingRules, attention, segmented: bool) -> tuple[np.ndarray, ...]:
    def value(q, k, v, segments):
        context = attention(q, k, v, segments)
        weights = jnp.sin(jnp.arange(context.size, dtype=jnp.float32)).reshape(context.shape)
        return jnp.sum(context * jax.reshard(weights, jax.typeof(context).sharding)), context

    q, k, v, segments = make_operands()
    with mesh_context(rules.mesh):
        arrays = [
            shard_host_array(rules, array, axes)
            for array, axes in zip((q, k, v), (AXES[0], AXES[1], AXES[1]), strict=True)
        ]
        documents = shard_host_array(rules, segments if segmented else np.zeros_like(segments), AXES[2])
        gradients, context = jax.jit(jax.grad(value, argnums=(0, 1, 2), has_aux=True))(*arrays, documents)
    return tuple(np.asarray(array) for array in (context, *gradients))


@pytest.mark.parametrize(
    "segmented", [True, pytest.param(False, marks=pytest.mark.nightly)], ids=["segments", "one segment"]
)
@pytest.mark.parametrize(
    "spec", ["data=1,model=1", "data=2,model=2", pytest.param("data=1,model=4", marks=pytest.mark.nightly)]
)
def test_splash_attention_equals_dot_product_attention(spec: str, segmented: bool):
    rules = sharding_rules_for(spec)
    splash = partial(splash_attention, rules, compute_dtype=jnp.bfloat16, interpret=True)
    expected = compute_context_and_gradients(rules, plain_attention, segmented)
    found = compute_context_and_gradients(rules, splash, segmented)
    for one, other in zip(found, expected, strict=True):
        # Both round operands to bfloat16 (8 bits), at different steps of the computation.
        np.testing.assert_allclose(one, other, atol=2.0**-6 * np.abs(expected[0]).max(), rtol=2.0**-5)


@pytest.mark.compat
def test_segments_change_the_result():
    rules = sharding_rules_for("data=1,model=1")
    whole, cut = (compute_context_and_gradients(rules, plain_attention, segmented)[0] for segmented in (False, True))
    assert np.abs(whole - cut).max() > 0.5
