"""Fully sharded data parallelism: all-gather of weights, reduce-scatter of gradients.

Each replica computes its term of a gradient in a `shard_map`, followed by one reduce-scatter in the accumulation type.
Left to XLA as one program over the mesh, whole gradients may be summed on every replica, or in a narrower type.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_selftrain.distributed.mesh import AxisGroups, torus_axis_groups
from jax_selftrain.distributed.sharding import Axes, ShardingRules


def is_fsdp_sharded(rules: ShardingRules, axes: Axes) -> bool:
    """Return True if a parameter is sharded over replicas along `embed`."""
    return "embed" in axes and dict(rules.logical_to_mesh)["embed"] == "data" and rules.data_parallelism > 1


def unshard_param(rules: ShardingRules, weight: Array, axes: Axes, dtype: DTypeLike) -> Array:
    """Cast a stored parameter and gather it along `embed`, as XLA chooses."""
    return jax.reshard(weight.astype(dtype), rules.unsharded_embed(axes))


def all_gather_param(rules: ShardingRules, weight: Array, axes: Axes, dtype: DTypeLike) -> Array:
    """All-gather an fsdp-sharded parameter and cast it; callers define the gradient (`psum_scatter_grad`).

    `check_vma` is off: JAX types the gathered value as one that varies over replicas.
    """
    if not is_fsdp_sharded(rules, axes):
        return unshard_param(rules, weight, axes, dtype)

    axis_groups = torus_axis_groups(rules.mesh)

    @partial(jax.shard_map, in_specs=rules.spec(axes), out_specs=rules.unsharded_embed(axes).spec, check_vma=False)
    def gather(shard: Array) -> Array:
        return all_gather(shard, axes.index("embed"), axis_groups)

    return gather(weight.astype(dtype))


def psum_scatter_grad(
    rules: ShardingRules,
    axes: Axes,
    partial_sum: Callable[..., Array],
    specs: tuple[PartitionSpec, ...],
    *arrays: Array,
) -> Array:
    """Sum the gradients of replicas into an fsdp-sharded parameter.

    Args:
      rules, axes: of the parameter.
      partial_sum: maps a device's shards of the arrays to its term, which has the parameter's full width.
      specs: partition of the arrays.
    """
    axis_groups = torus_axis_groups(rules.mesh)

    @partial(jax.shard_map, in_specs=specs, out_specs=rules.spec(axes))
    def scatter(*shards: Array) -> Array:
        return reduce_scatter(partial_sum(*shards), axes.index("embed"), axis_groups)

    return scatter(*arrays)


def all_gather(shard: Array, dimension: int, axis_groups: Sequence[AxisGroups]) -> Array:
    """All-gather shards along a dimension, inside a `shard_map` over `data`.

    Shards that are not tile-aligned are sent as rows, along one torus dimension after the other: a TPU's compiler would
    replace the all-gather by an all-reduce of zero-padded arrays, which moves twice as much.
    """
    if _is_tile_aligned(shard.shape, dimension):
        return jax.lax.all_gather(shard, "data", axis=dimension, tiled=True)
    rows = _to_rows(shard)
    for groups in reversed(axis_groups or (None,)):
        rows = jax.lax.all_gather(rows, "data", axis_index_groups=groups)
    shards = jnp.moveaxis(rows.reshape(-1, *shard.shape), 0, dimension)
    return shards.reshape(*shard.shape[:dimension], -1, *shard.shape[dimension + 1 :])


def reduce_scatter(array: Array, dimension: int, axis_groups: Sequence[AxisGroups]) -> Array:
    """Sum over replicas; each keeps its shard. Inside a `shard_map` over `data`.

    Runs along one torus dimension after the other, unaligned shards as rows: a TPU's compiler would use an all-reduce.
    """
    for groups in axis_groups or (None,):
        parts = len(groups[0]) if groups else jax.lax.axis_size("data")
        scatter = partial(jax.lax.psum_scatter, axis_name="data", axis_index_groups=groups)
        shape = (*array.shape[:dimension], array.shape[dimension] // parts, *array.shape[dimension + 1 :])
        if _is_tile_aligned(shape, dimension):
            array = scatter(array, scatter_dimension=dimension, tiled=True)
        else:
            split = array.reshape(*shape[:dimension], parts, *shape[dimension:])
            array = scatter(jax.vmap(_to_rows)(jnp.moveaxis(split, dimension, 0))).reshape(shape)
    return array


_TPU_LANES = 128
"""Width of a TPU tile."""


def _is_tile_aligned(shape: Sequence[int], dimension: int) -> bool:
    """Return True if shards along a dimension are whole tiles."""
    return dimension == len(shape) - 1 and shape[dimension] % _TPU_LANES == 0


def _to_rows(shard: Array) -> Array:
    """Reshape to rows of whole tiles, if possible."""
    return shard.reshape(-1, _TPU_LANES if shard.size % _TPU_LANES == 0 else shard.shape[-1])


EMBEDDING_AXES: Axes = ("vocab", "embed")
"""Logical axes of the embedding and of the output projection."""


def embedding_lookup(
    rules: ShardingRules, table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: DTypeLike
) -> Float[Array, "B T D"]:
    """Look up rows of a stored embedding; gradients are summed in `dtype`."""
    if is_fsdp_sharded(rules, EMBEDDING_AXES):
        return _fsdp_embedding_lookup(rules, jnp.dtype(dtype), table, tokens)
    return _take_rows(rules, dtype, unshard_param(rules, table, EMBEDDING_AXES, table.dtype), tokens)


def _take_rows(rules: ShardingRules, dtype: DTypeLike, table: Array, tokens: Array) -> Array:
    return table.at[tokens].get(out_sharding=rules.sharding(("batch", None, None))).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fsdp_embedding_lookup(rules: ShardingRules, dtype: jnp.dtype, table: Array, tokens: Array) -> Array:
    return _take_rows(rules, dtype, all_gather_param(rules, table, EMBEDDING_AXES, table.dtype), tokens)


def _fsdp_embedding_lookup_bwd(
    rules: ShardingRules, dtype: jnp.dtype, operands: tuple[Array, Array], cotangent: Array
) -> tuple[Array, None]:
    table, tokens = operands
    axis = rules.spec(EMBEDDING_AXES)[0]
    shard_size = table.shape[0] // (1 if axis is None else rules.tensor_parallelism)

    def partial_sum(tokens: Array, cotangent: Array) -> Array:
        if axis is not None:  # rows of other devices are out of range and dropped
            tokens = tokens - shard_size * jax.lax.axis_index(axis)
            tokens = jnp.where(tokens < 0, shard_size, tokens)
        zeros = jnp.zeros_like(cotangent, shape=(shard_size, table.shape[1]))
        return zeros.at[tokens].add(cotangent, mode="drop")

    batch = rules.sharding(("batch", None))
    specs = (batch.spec, rules.spec(("batch", None, None)))
    gradient = psum_scatter_grad(rules, EMBEDDING_AXES, partial_sum, specs, jax.reshard(tokens, batch), cotangent)
    return gradient.astype(table.dtype), None


_fsdp_embedding_lookup.defvjp(
    lambda rules, dtype, table, tokens: (_fsdp_embedding_lookup(rules, dtype, table, tokens), (table, tokens)),
    _fsdp_embedding_lookup_bwd,
)
