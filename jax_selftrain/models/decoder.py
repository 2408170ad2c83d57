"""The forward pass: one decoder for every family, scanned over layers.

Pure functions of (config, rules, params, inputs); config and rules are hashable and static under `jax.jit`. Call
inside `mesh_context(rules.mesh)`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_selftrain.config import Remat
from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.models.attention import can_use_splash, dot_product_attention, splash_attention
from jax_selftrain.models.config import DecoderConfig
from jax_selftrain.models.layers import (
    PreAttention,
    decoder_layer,
    embed,
    layer_slice,
    norm,
    rotary_tables,
    scan_xs,
    take_positions,
)
from jax_selftrain.models.matmul import accumulation_dtype, linear
from jax_selftrain.models.params import Params
from jax_selftrain.models.token_precompute import Precomputed, lookup

_REMATERIALIZED: dict[Remat, Callable[[Callable], Callable]] = {
    "none": lambda layer: layer,
    "dots": partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "full": jax.checkpoint,
}


def forward(
    config: DecoderConfig,
    rules: ShardingRules,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    subtree_ends: Int[Array, "B T"] | None = None,
    query_positions: Int[Array, "B Q"] | None = None,
    precomputed: Precomputed | None = None,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
    remat: Remat = "none",
) -> Float[Array, "B T D"] | Float[Array, "B Q D"]:
    """Causal forward pass up to and including the final norm.

    Args:
      config, rules: static.
      params: as `param_shardings(config, rules)` places them.
      tokens: token ids, sharded on `batch`.
      positions: rotary position of each token; default 0 … T−1.
      segments: document number of each token; a token sees only its own document. Default: one document a row.
      ends: for rows that are trees in preorder: the place behind the last token that goes on from this one. A token
        sees those on its path from the root alone. Needs `positions`, each one's depth, in which windows are measured.
      at: places in each row: the last layer asks its queries, and computes everything behind them, at these alone.
      known: what depends on a token alone; `tokens` are then places in it, of each row's own device. Needs `at`.
      compute_dtype: type of the matmul operands.
      remat: what the backward pass computes again: nothing, all but the products with weights (`dots`), or each layer
        from its input (`full`).

    Returns:
      Hidden states in fp32 (fp64 for fp64 compute), of all positions or of those at `at`.
    """
    if precomputed is not None and query_positions is None:
        raise ValueError("`known` needs `at`")
    dtype = accumulation_dtype(compute_dtype)
    length = tokens.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)
    if positions is None:
        positions = jnp.broadcast_to(index, (1, length))
    distance = index[:, None] - index[None, :]
    visible = (distance >= 0)[None]
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None, :])
    if subtree_ends is not None:
        visible = visible & (index[:, None] < subtree_ends[:, None, :])
        distance = positions[:, :, None] - positions[:, None, :]
    rotary = rotary_tables(config, positions, dtype)
    fused = subtree_ends is None and query_positions is None and can_use_splash(config, rules, length, compute_dtype)

    def layer(
        x: jax.Array, inputs: dict, queries: jax.Array | None = None, mine: PreAttention | None = None
    ) -> tuple[jax.Array, None]:
        seen = visible & (distance < inputs["window"]) if "window" in inputs else visible

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            if fused:
                return splash_attention(rules, q, k, v, segments, compute_dtype), None
            visible_to_them = seen if queries is None else take_positions(rules, seen, queries)
            return dot_product_attention(q, k, v, visible_to_them, compute_dtype), None

        return decoder_layer(config, rules, inputs["weights"], x, rotary, attend, compute_dtype, at=queries, known=mine)

    inputs = scan_xs(config, params)
    if query_positions is None:
        x, _ = jax.lax.scan(_REMATERIALIZED[remat](layer), embed(rules, params, tokens, dtype), inputs)
    else:
        first, last = 0, config.num_layers - 1
        if precomputed is None:
            x = embed(rules, params, tokens, dtype)
        else:
            precomputed = lookup(rules, precomputed, tokens)
            x = precomputed.x
            if last > 0:
                x, _ = layer(x, layer_slice(inputs, 0), mine=precomputed.qkv_and_mlp)
                first = 1

        # Slices of the stacked weights, as inputs of a scan, would be copies.
        def layer_at(x: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
            return layer(x, layer_slice(inputs, index))

        x, _ = jax.lax.scan(layer_at, x, jnp.arange(first, last))
        x, _ = layer(x, layer_slice(inputs, last), query_positions)
    return norm(config, rules, x, params["final_norm"])


def unembed(
    config: DecoderConfig,
    rules: ShardingRules,
    params: Params,
    hidden: Float[Array, "*lead D"],
    *,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
) -> Float[Array, "*lead V"]:
    """Logits in fp32. The first dimension of `hidden` is the batch; V lies on `model` under tensor parallelism."""
    kernel = params["embed"]["embedding"] if config.tie_word_embeddings else params["head"]["kernel"]
    return linear(rules, kernel, ("vocab", "embed"), 1, hidden, compute_dtype)
