"""Weights that replicas divide among them (fsdp): gathered where they are used, their gradients summed and scattered.

Each replica's part of a gradient is computed by itself, in a `shard_map`, and meets the others' in one reduce-scatter
in the type that gradients are summed in. Written as one program over the mesh, XLA may instead sum whole gradients on
every replica and throw most of them away, or sum in a narrower type, as it finds best for the shapes at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jax_selftrain.distributed.mesh import AxisGroups, torus_axis_groups
from jax_selftrain.distributed.sharding import Axes, ShardingRules


def is_fsdp_sharded(rules: ShardingRules, axes: Axes) -> bool:
    """Whether a parameter with these axes is divided along its `embed` axis."""
    return "embed" in axes and dict(rules.logical_to_mesh)["embed"] == "data" and rules.data_parallelism > 1


def unshard_param(rules: ShardingRules, weight: Array, axes: Axes, dtype: jax.typing.DTypeLike) -> Array:
    """A stored parameter, cast and then gathered along `embed`, as XLA finds best."""
    return jax.reshard(weight.astype(dtype), rules.unsharded_embed(axes))


def all_gather_param(rules: ShardingRules, weight: Array, axes: Axes, dtype: jax.typing.DTypeLike) -> Array:
    """The same by an all-gather in that type. Its gradient is the business of those who call it (`scattered_sum`).

    (Unchecked, since JAX takes what has been gathered for a value of each replica's own.)
    """
    if not is_fsdp_sharded(rules, axes):
        return unshard_param(rules, weight, axes, dtype)

    axis_groups = torus_axis_groups(rules.mesh)

    @partial(jax.shard_map, in_specs=rules.spec(axes), out_specs=rules.unsharded_embed(axes).spec, check_vma=False)
    def gather(part: Array) -> Array:
        return all_gather(part, axes.index("embed"), axis_groups)

    return gather(weight.astype(dtype))


def psum_scatter_grad(
    rules: ShardingRules,
    axes: Axes,
    partial_sum: Callable[..., Array],
    specs: tuple[PartitionSpec, ...],
    *arrays: Array,
) -> Array:
    """The sum over replicas of `partial_sum(*parts)`, which is of a divided parameter's whole width, as it is stored.

    Args:
      rules, axes: of the parameter.
      partial_sum: what each device adds, from its parts of the arrays.
      specs: how the arrays lie.
    """
    lines = torus_axis_groups(rules.mesh)

    @partial(jax.shard_map, in_specs=specs, out_specs=rules.spec(axes))
    def add(*parts: Array) -> Array:
        return reduce_scatter(partial_sum(*parts), axes.index("embed"), lines)

    return add(*arrays)


def all_gather(part: Array, dimension: int, lines: Sequence[AxisGroups]) -> Array:
    """All replicas' parts along a dimension. Inside a `shard_map` over `data`.

    Parts that are no whole tiles are sent as rows, one above the other, along one dimension of the torus after the
    other (`mesh.data_lines`): else a TPU's compiler would add up arrays that are zero but for a part (all-reduce),
    which moves twice as much.
    """
    if _is_tile_aligned(part.shape, dimension):
        return jax.lax.all_gather(part, "data", axis=dimension, tiled=True)
    rows = _as_rows(part)
    for groups in reversed(lines or (None,)):
        rows = jax.lax.all_gather(rows, "data", axis_index_groups=groups)
    parts = jnp.moveaxis(rows.reshape(-1, *part.shape), 0, dimension)
    return parts.reshape(*part.shape[:dimension], -1, *part.shape[dimension + 1 :])


def reduce_scatter(array: Array, dimension: int, lines: Sequence[AxisGroups]) -> Array:
    """The replicas' sum, of which each keeps its part along a dimension. Inside a `shard_map` over `data`.

    One dimension of the torus after the other, and parts that are no whole tiles one above the other: else a TPU's
    compiler would sum everything everywhere.
    """
    for groups in lines or (None,):
        parts = len(groups[0]) if groups else jax.lax.axis_size("data")
        scatter = partial(jax.lax.psum_scatter, axis_name="data", axis_index_groups=groups)
        shard = (*array.shape[:dimension], array.shape[dimension] // parts, *array.shape[dimension + 1 :])
        if _is_tile_aligned(shard, dimension):
            array = scatter(array, scatter_dimension=dimension, tiled=True)
        else:
            split = array.reshape(*shard[:dimension], parts, *shard[dimension:])
            array = scatter(jax.vmap(_as_rows)(jnp.moveaxis(split, dimension, 0))).reshape(shard)
    return array


_TPU_LANES = 128
"""Columns of a TPU's tile."""


def _is_tile_aligned(part: Sequence[int], dimension: int) -> bool:
    """Whether parts of this shape, beside each other along a dimension, are whole tiles of a TPU each."""
    return dimension == len(part) - 1 and part[dimension] % _TPU_LANES == 0


def _as_rows(part: Array) -> Array:
    """The same numbers in rows that fill tiles, where that can be."""
    return part.reshape(-1, _TPU_LANES if part.size % _TPU_LANES == 0 else part.shape[-1])


_TABLE: Axes = ("vocab", "embed")


def embedding_lookup(
    rules: ShardingRules, table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: jax.typing.DTypeLike
) -> Float[Array, "B T D"]:
    """Rows of the embedding as it is stored, in the type of the residual stream, in which gradients are summed."""
    if is_fsdp_sharded(rules, _TABLE):
        return _fsdp_embedding_lookup(rules, jnp.dtype(dtype), table, tokens)
    return _rows(rules, dtype, unshard_param(rules, table, _TABLE, table.dtype), tokens)


def _rows(rules: ShardingRules, dtype: jax.typing.DTypeLike, table: Array, tokens: Array) -> Array:
    """Of one that is whole along its width."""
    return table.at[tokens].get(out_sharding=rules.sharding(("batch", None, None))).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fsdp_embedding_lookup(rules: ShardingRules, dtype: jnp.dtype, table: Array, tokens: Array) -> Array:
    return _rows(rules, dtype, all_gather_param(rules, table, _TABLE, table.dtype), tokens)


def _divided_rows_forward(
    rules: ShardingRules, dtype: jnp.dtype, table: Array, tokens: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _fsdp_embedding_lookup(rules, dtype, table, tokens), (table, tokens)


def _divided_rows_backward(
    rules: ShardingRules, dtype: jnp.dtype, operands: tuple[Array, Array], cotangent: Array
) -> tuple[Array, None]:
    table, tokens = operands
    axis = rules.spec(_TABLE)[0]
    here = table.shape[0] // (1 if axis is None else rules.tensor_parallelism)

    def partial_sum(tokens: Array, cotangent: Array) -> Array:
        if axis is not None:  # what is another device's falls outside, where nothing is added
            tokens = tokens - here * jax.lax.axis_index(axis)
            tokens = jnp.where(tokens < 0, here, tokens)
        zeros = jnp.zeros_like(cotangent, shape=(here, table.shape[1]))
        return zeros.at[tokens].add(cotangent, mode="drop")

    batch = rules.sharding(("batch", None))
    specs = (batch.spec, rules.spec(("batch", None, None)))
    found = psum_scatter_grad(rules, _TABLE, partial_sum, specs, jax.reshard(tokens, batch), cotangent)
    return found.astype(table.dtype), None


_fsdp_embedding_lookup.defvjp(_divided_rows_forward, _divided_rows_backward)
