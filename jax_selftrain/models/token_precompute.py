"""What a decoder computes of a token alone, kept for all places where the token stands.

Positions enter by rotation only, so everything up to the first rotation depends on nothing but the token: its row of
the embedding, the first layer's queries, keys and values, and, where a layer's MLP does not wait for its attention
(GPT-NeoX), that too. Of text, in which few tokens are different, most of a layer is spared.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.models.config import DecoderConfig
from jax_selftrain.models.layers import PreAttention, embed, layer_slice, pre_attention, scan_xs
from jax_selftrain.models.matmul import accumulation_dtype
from jax_selftrain.models.params import Params


class Precomputed(NamedTuple):
    """Of W tokens on each of S devices along `data`, each device its own; or of every position [B, T] of a batch."""

    x: Float[Array, "S W D"]
    """Rows of the embedding."""
    qkv_and_mlp: PreAttention
    """What the first layer makes of them, [S, W, ...]."""


def abstract_precomputed(
    config: DecoderConfig, rules: ShardingRules, params: Params, indices: int, compute_dtype: jax.typing.DTypeLike
) -> Precomputed:
    """Shapes and shardings of what is known of so many tokens on each device."""
    tokens = jax.ShapeDtypeStruct(
        (rules.data_parallelism, indices), jnp.int32, sharding=rules.sharding(("batch", None))
    )
    return jax.eval_shape(partial(_known_of, config, rules, compute_dtype=compute_dtype), params, tokens)


def precompute(
    config: DecoderConfig,
    rules: ShardingRules,
    params: Params,
    table: Precomputed,
    tokens: Int[Array, "S W"],
    chunks: Int[Array, ""],
    size: int,
    *,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
) -> Precomputed:
    """Put what is known of these tokens in place of what was known.

    Args:
      known: as `abstract_known` says.
      chunks: how many chunks of tokens, from the first, are of interest on the device that has most.
      size: tokens of a chunk; divides W.
    """

    def learn(i: Array, known: Precomputed) -> Precomputed:
        part = jax.lax.dynamic_slice_in_dim(tokens, i * size, size, axis=1)
        new = _known_of(config, rules, params, part, compute_dtype=compute_dtype)
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * size, axis=1)
        return jax.tree.map(write, known, new)

    return jax.lax.fori_loop(0, chunks, learn, table)


def lookup(rules: ShardingRules, known: Precomputed, places: Int[Array, "B T"]) -> Precomputed:
    """What is known of the token at each position, named by its place in the table of the row's own device."""
    specs = jax.tree.map(lambda part: jax.typeof(part).sharding.spec, known)

    @partial(jax.shard_map, in_specs=(specs, rules.spec(("batch", None))), out_specs=specs)
    def recall(known: Precomputed, places: Array) -> Precomputed:
        return jax.tree.map(lambda part: part[0][places], known)

    return recall(known, places)


def _known_of(
    config: DecoderConfig, rules: ShardingRules, params: Params, tokens: Array, *, compute_dtype: jax.typing.DTypeLike
) -> Precomputed:
    x = embed(rules, params, tokens, accumulation_dtype(compute_dtype))
    weights = layer_slice(scan_xs(config, params), 0)["weights"]
    return Precomputed(x, pre_attention(config, rules, weights, x, compute_dtype))
