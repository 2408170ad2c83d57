"""Precomputed first-layer activations that depend only on the token id.

Where positions enter by rotation alone, the embedding, the first layer's queries, keys and values, and with a parallel
residual (GPT-NeoX) its MLP depend on nothing but the token; with learned positions (GPT-2) only the embedding does.
Scored texts repeat few tokens many times.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.models.config import DecoderConfig
from jax_selftrain.models.fsdp import embedding_lookup
from jax_selftrain.models.layers import PreAttention, layer_slice, pre_attention, scan_xs
from jax_selftrain.models.matmul import accumulation_dtype
from jax_selftrain.models.params import Params


def abstract_precomputed(
    config: DecoderConfig, rules: ShardingRules, params: Params, capacity: int, compute_dtype: DTypeLike
) -> PreAttention:
    """Return shapes and shardings for `capacity` tokens on each device."""
    tokens = rules.abstract_array((rules.data_parallelism, capacity), jnp.int32, ("batch", None))
    return jax.eval_shape(partial(_compute, config, rules, compute_dtype=compute_dtype), params, tokens)


def precompute(
    config: DecoderConfig,
    rules: ShardingRules,
    params: Params,
    table: PreAttention,
    tokens: Int[Array, "X W"],
    num_chunks: Int[Array, ""],
    chunk_size: int,
    *,
    compute_dtype: DTypeLike = jnp.float32,
) -> PreAttention:
    """Overwrite a table with the activations of the given tokens.

    Args:
      table: activations [X, W, ...], as of `abstract_precomputed`.
      num_chunks: chunks of tokens to compute, from the first; the maximum over devices.
      chunk_size: tokens of a chunk; divides W.
    """

    def compute_chunk(i: Array, table: PreAttention) -> PreAttention:
        chunk = jax.lax.dynamic_slice_in_dim(tokens, i * chunk_size, chunk_size, axis=1)
        activations = _compute(config, rules, params, chunk, compute_dtype=compute_dtype)
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * chunk_size, axis=1)
        return jax.tree.map(write, table, activations)

    return jax.lax.fori_loop(0, num_chunks, compute_chunk, table)


def lookup(rules: ShardingRules, table: PreAttention, indices: Int[Array, "B T"]) -> PreAttention:
    """Gather the activations of every position from its device's table."""
    specs = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, table)

    @partial(jax.shard_map, in_specs=(specs, rules.spec(("batch", None))), out_specs=specs)
    def gather(table: PreAttention, indices: Array) -> PreAttention:
        return jax.tree.map(lambda leaf: leaf[0][indices], table)

    return gather(table, indices)


def _compute(
    config: DecoderConfig, rules: ShardingRules, params: Params, tokens: Array, *, compute_dtype: DTypeLike
) -> PreAttention:
    x = embedding_lookup(rules, params["embed"]["embedding"], tokens, accumulation_dtype(compute_dtype))
    if config.learned_positions:
        return PreAttention(x, None, None, None, None)
    weights = layer_slice(scan_xs(config, params), 0)["weights"]
    return pre_attention(config, rules, weights, x, compute_dtype)
