"""Fully sharded parameters: all-gather, reduce-scatter, and their gradients."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jax_selftrain.distributed.mesh import AxisGroups, make_mesh, mesh_context
from jax_selftrain.distributed.sharding import make_sharding_rules, shard_host_array
from jax_selftrain.models.fsdp import all_gather, all_gather_param, embedding_lookup, reduce_scatter
from jax_selftrain.models.matmul import linear

TORUS: dict[str, list[AxisGroups]] = {
    "one ring": [],
    "2×4": [[[0, 4], [1, 5], [2, 6], [3, 7]], [[0, 1, 2, 3], [4, 5, 6, 7]]],
    "2×2×2": [
        [[0, 4], [1, 5], [2, 6], [3, 7]],
        [[0, 2], [1, 3], [4, 6], [5, 7]],
        [[0, 1], [2, 3], [4, 5], [6, 7]],
    ],
}


@pytest.mark.parametrize("torus", TORUS)
@pytest.mark.parametrize(("shape", "dimension"), [((6, 24), 1), ((3, 1024), 1), ((16, 5), 0), ((2, 8, 64), 1)])
def test_reduce_scatter_leaves_each_replica_its_shard_of_the_sum(torus: str, shape: tuple[int, ...], dimension: int):
    parts = np.random.default_rng(0).integers(-1000, 1000, (8, *shape)).astype(np.float32)  # sums are exact
    kept = PartitionSpec(*["data" if k == dimension else None for k in range(len(shape))])
    with mesh_context(make_mesh("data=8")):

        @jax.jit
        @partial(jax.shard_map, in_specs=PartitionSpec("data"), out_specs=kept)
        def scatter(own: jax.Array) -> jax.Array:
            return reduce_scatter(own[0], dimension, TORUS[torus])

        found = scatter(jax.device_put(parts, jax.NamedSharding(make_mesh("data=8"), PartitionSpec("data"))))
    np.testing.assert_array_equal(np.asarray(found), parts.sum(axis=0))


@pytest.mark.parametrize("torus", TORUS)
@pytest.mark.parametrize(("shape", "dimension"), [((6, 24), 1), ((3, 1024), 1), ((16, 5), 0), ((2, 8, 64), 1)])
def test_all_gather_concatenates_shards_in_order(torus: str, shape: tuple[int, ...], dimension: int):
    whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    kept = PartitionSpec(*["data" if k == dimension else None for k in range(len(shape))])
    with mesh_context(make_mesh("data=8")):

        @jax.jit
        @partial(jax.shard_map, in_specs=kept, out_specs=PartitionSpec("data"))
        def gather(part: jax.Array) -> jax.Array:
            return all_gather(part, dimension, TORUS[torus])[None]

        found = gather(jax.device_put(whole, jax.NamedSharding(make_mesh("data=8"), kept)))
    np.testing.assert_array_equal(np.asarray(found), np.broadcast_to(whole, (8, *shape)))


@pytest.mark.parametrize("mesh", ["data=4,model=2", "data=8"])
def test_embedding_lookup_of_a_sharded_table_and_its_gradient(mesh: str):
    sizes = {"embed": 16, "vocab": 10, "mlp": 4, "kv_heads": 2, "q_per_kv": 1}
    rules = make_sharding_rules("fsdp", make_mesh(mesh), sizes)
    rng = np.random.default_rng(1)
    table, weights = (rng.integers(-9, 9, size).astype(np.float32) for size in ((10, 16), (8, 3, 16)))
    tokens = rng.integers(0, 10, (8, 3)).astype(np.int32)  # several replicas use one row
    with mesh_context(rules.mesh):
        there = shard_host_array(rules, table, ("vocab", "embed"))
        batch = shard_host_array(rules, tokens, ("batch", None))
        found = jax.jit(lambda there: embedding_lookup(rules, there, batch, jnp.float32))(there)
        factors = shard_host_array(rules, weights, ("batch", None, None))
        gradient = jax.jit(
            jax.grad(lambda there: jnp.sum(factors * embedding_lookup(rules, there, batch, jnp.float32)))
        )(there)
        again = jax.jit(jax.grad(lambda there: jnp.sum(factors * embedding_lookup(rules, there, tokens, jnp.float32))))(
            there
        )  # replicated tokens
        whole = jax.jit(partial(all_gather_param, rules, axes=("vocab", "embed"), dtype=jnp.bfloat16))(there)
    np.testing.assert_array_equal(np.asarray(found), table[tokens])
    expected = np.zeros_like(table)
    np.add.at(expected, tokens, weights)
    np.testing.assert_array_equal(np.asarray(gradient), expected)
    np.testing.assert_array_equal(np.asarray(again), expected)
    assert gradient.sharding.spec == there.sharding.spec
    assert whole.dtype == jnp.bfloat16
    assert whole.sharding.spec == rules.unsharded_embed(("vocab", "embed")).spec
    np.testing.assert_array_equal(np.asarray(whole, np.float32), table)


def test_gradients_of_a_bfloat16_table_are_summed_in_fp32():
    sizes = {"embed": 4, "vocab": 2, "mlp": 4, "kv_heads": 2, "q_per_kv": 1}
    rules = make_sharding_rules("fsdp", make_mesh("data=2"), sizes)
    with mesh_context(rules.mesh):
        table = shard_host_array(rules, np.zeros((2, 4), jnp.bfloat16), ("vocab", "embed"))
        tokens = shard_host_array(rules, np.zeros((2, 1024), np.int32), ("batch", None))
        ones = jax.jit(jax.grad(lambda table: jnp.sum(embedding_lookup(rules, table, tokens, jnp.float32))))(table)
    assert ones.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(ones, np.float32), [[2048] * 4, [0] * 4])  # bfloat16 stops at 256


@pytest.mark.parametrize("batch", [("batch", None, None), (None, None, None)])
def test_gradient_of_a_sharded_kernel_for_sharded_or_replicated_inputs(batch: tuple[str | None, ...]):
    sizes = {"embed": 8, "vocab": 4, "mlp": 6, "kv_heads": 2, "q_per_kv": 1}
    rules = make_sharding_rules("fsdp", make_mesh("data=4,model=2"), sizes)
    rng = np.random.default_rng(2)
    kernel, x = (rng.integers(-9, 9, shape).astype(np.float32) for shape in ((6, 8), (4, 3, 8)))
    axes = ("mlp", "embed")
    with mesh_context(rules.mesh):
        there, inputs = shard_host_array(rules, kernel, axes), shard_host_array(rules, x, batch)
        square = jax.jit(
            jax.grad(lambda w, x: jnp.sum(jnp.square(linear(rules, w, axes, 1, x, jnp.float32))), argnums=(0, 1))
        )
        of_kernel, of_x = square(there, inputs)
    y = x @ kernel.T
    np.testing.assert_array_equal(np.asarray(of_kernel), 2 * np.einsum("btf,btd->fd", y, x))
    np.testing.assert_array_equal(np.asarray(of_x), 2 * y @ kernel)
