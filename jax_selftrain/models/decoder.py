"""The forward pass: one decoder for every family, scanned over layers.

Pure functions of (config, rules, params, inputs); config and rules are hashable and static under `jax.jit`. Call them
inside `mesh_context(rules.mesh)`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_selftrain.config import Remat
from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.models.attention import can_use_splash, dot_product_attention, splash_attention
from jax_selftrain.models.config import DecoderConfig
from jax_selftrain.models.layers import (
    PreAttention,
    add_positions,
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
from jax_selftrain.models.token_precompute import lookup

_REMAT_POLICIES: dict[Remat, Callable[[Callable], Callable]] = {
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
    precomputed: PreAttention | None = None,
    compute_dtype: DTypeLike = jnp.float32,
    remat: Remat = "none",
) -> Float[Array, "B T D"] | Float[Array, "B Q D"]:
    """Run the causal forward pass up to and including the final norm.

    Args:
      config, rules: static.
      params: sharded as `abstract_params(config, rules=rules)`.
      tokens: token ids, sharded on `batch`; with `precomputed`, indices into the table of the row's device.
      positions: rotary positions; default 0 … T−1.
      segments: document number of each token; a token attends to its own document only. Default: one per row.
      subtree_ends: for rows that hold prefix tries in preorder: the index after the last descendant of each token. A
        token attends to its ancestors only. `positions`, the depths, are required; windows count depths.
      query_positions: positions for which the last layer computes queries and everything after them; default: all.
      precomputed: first-layer activations by token; requires `query_positions`.
      compute_dtype: type of matmul operands.
      remat: recompute nothing, all but products with weights (`dots`), or whole layers (`full`) in the backward pass.

    Returns:
      Hidden states in fp32 (fp64 for fp64 compute) of all positions, or of `query_positions`.
    """
    if precomputed is not None and query_positions is None:
        raise ValueError("precomputed requires query_positions")
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
    use_splash = (
        subtree_ends is None and query_positions is None and can_use_splash(config, rules, length, compute_dtype)
    )

    def layer(x: Array | PreAttention, inputs: dict, queries: Array | None = None) -> tuple[Array, None]:
        mask = visible & (distance < inputs["window"]) if "window" in inputs else visible

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
            if use_splash:
                return splash_attention(rules, q, k, v, segments, compute_dtype), None
            query_mask = mask if queries is None else take_positions(rules, mask, queries)
            return dot_product_attention(q, k, v, query_mask, compute_dtype), None

        return decoder_layer(
            config,
            rules,
            inputs["weights"],
            x,
            rotary.of_layer(inputs),
            attend,
            compute_dtype,
            query_positions=queries,
        )

    inputs = scan_xs(config, params)
    if query_positions is None:
        x, _ = jax.lax.scan(
            _REMAT_POLICIES[remat](layer), embed(config, rules, params, tokens, positions, dtype), inputs
        )
    else:
        first, last = 0, config.num_layers - 1
        if precomputed is None:
            x = embed(config, rules, params, tokens, positions, dtype)
        else:
            pre = lookup(rules, precomputed, tokens)
            x = add_positions(config, rules, params, pre.x, positions)
            if pre.q is not None and last > 0:
                x, _ = layer(pre, layer_slice(inputs, 0))
                first = 1

        # A scan over slices of the stacked weights would copy them.
        def layer_at(x: Array, index: Array) -> tuple[Array, None]:
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
    compute_dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*lead V"]:
    """Compute fp32 logits; V is sharded on `model` under tensor parallelism.

    The first dimension of `hidden` is the batch.
    """
    kernel = params["embed"]["embedding"] if config.tie_word_embeddings else params["head"]["kernel"]
    return linear(rules, kernel, ("vocab", "embed"), 1, hidden, compute_dtype)
