"""The block of a decoder, as pure functions of weights and activations.

Numerics (one rule for every family): the residual stream, norms, rotary tables, softmax and logits are fp32 always;
`compute_dtype` is the type of matmul *operands* only (see `models.products`).

Weights arrive as they are stored and are gathered along `embed` where they are used, so that fsdp gathers one layer
at a time inside the scan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.models.config import DecoderConfig, RopeConfig
from jax_selftrain.models.fsdp import embedding_lookup, unshard_param
from jax_selftrain.models.matmul import dense
from jax_selftrain.models.params import Params

State = TypeVar("State")

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def norm(config: DecoderConfig, rules: ShardingRules, x: jax.Array, weights: Params) -> jax.Array:
    """LayerNorm or RMSNorm over the last dimension, in the type of `x` (fp32).

    Args:
      x: [..., D].
      weights: `scale` [D] and, for LayerNorm, `bias` [D].
    """
    if config.norm == "layernorm":
        centered = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
        x = centered * jax.lax.rsqrt(variance + config.norm_eps)
        return x * unshard_param(rules, weights["scale"], ("embed",), x.dtype) + unshard_param(
            rules, weights["bias"], ("embed",), x.dtype
        )
    return rms_norm(x, unshard_param(rules, weights["scale"], ("embed",), x.dtype), config.norm_eps)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x²) + eps) · scale over the last dimension."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * scale


def rope_frequencies(rope: RopeConfig, rotary_dim: int) -> tuple[np.ndarray, float]:
    """Angle per position of each rotated pair, and the scale of the rotated vectors.

    Every step is rounded to fp32 where transformers rounds it: a frequency's last bit, times a position of thousands,
    is an angle off by 1e-4, and a model has been trained with the rounded ones.

    Returns:
      Frequencies [rotary_dim/2] in radians per position (fp32), and the attention factor (1 except for yarn).
    """
    f32 = np.float32
    exponents = np.arange(0, rotary_dim, 2, dtype=f32) / f32(max(rotary_dim, 1))
    powers = np.power(float(rope.theta), exponents.astype(np.float64)).astype(f32)
    frequencies = f32(1) / powers
    if rope.kind == "linear":
        return frequencies / f32(rope.factor), 1.0
    if rope.kind == "llama3":
        ratio = f32(rope.original_max_position) / (f32(2 * math.pi) / frequencies)
        smooth = (ratio - f32(rope.low_freq_factor)) / f32(rope.high_freq_factor - rope.low_freq_factor)
        smooth = np.clip(smooth, f32(0), f32(1))
        return (1 - smooth) * frequencies / f32(rope.factor) + smooth * frequencies, 1.0
    if rope.kind == "yarn":

        def dimension_of(rotations: float) -> float:
            span = math.log(rope.original_max_position / (rotations * 2 * math.pi))
            return rotary_dim * span / (2 * math.log(rope.theta))

        low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        span = high - low if high != low else 0.001
        ramp = (np.arange(rotary_dim // 2, dtype=f32) - f32(low)) / f32(span)
        kept = 1 - np.clip(ramp, f32(0), f32(1))
        scale = rope.attention_factor if rope.attention_factor is not None else 0.1 * math.log(rope.factor) + 1.0
        return f32(1) / (f32(rope.factor) * powers) * (1 - kept) + frequencies * kept, scale
    return frequencies, 1.0


class Rotary(NamedTuple):
    """Cosines and sines [B, T, rotary_dim/2] of every position, scaled by the attention factor."""

    cos: jax.Array
    sin: jax.Array


def rotary_tables(config: DecoderConfig, positions: Int[Array, "B T"], dtype: jax.typing.DTypeLike) -> Rotary:
    """The rotation of each position, shared by all layers."""
    frequencies, scale = rope_frequencies(config.rope, config.rotary_dim)
    angles = positions[..., None].astype(dtype) * jnp.asarray(frequencies, dtype)
    return Rotary(jnp.cos(angles) * scale, jnp.sin(angles) * scale)


def apply_rotary(x: jax.Array, rotary: Rotary) -> jax.Array:
    """Rotate the first `rotary_dim` dimensions of heads: x [B, T, (heads…), K], pairs (i, i + rotary_dim/2)."""
    half = rotary.cos.shape[-1]
    if not half:
        return x
    heads = tuple(range(2, x.ndim - 1))
    cos, sin = jnp.expand_dims(rotary.cos, heads), jnp.expand_dims(rotary.sin, heads)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


AttentionFn = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, State]]
"""(q [B,T,G,R,K], k [B,T,G,K], v [B,T,G,K]) → context [B,T,G,R,K] and whatever state it keeps (a cache, nothing)."""


class PreAttention(NamedTuple):
    """What a layer makes of each token by itself, before tokens meet."""

    q: Float[Array, "B T G R K"]
    """Not rotated yet."""
    k: Float[Array, "B T G K"]
    """Not rotated yet."""
    v: Float[Array, "B T G K"]
    mlp: Float[Array, "B T D"] | None
    """What the MLP adds, where it does not wait for attention (parallel residual)."""


def pre_attention(
    config: DecoderConfig,
    rules: ShardingRules,
    weights: Params,
    x: Float[Array, "B T D"],
    compute_dtype: jax.typing.DTypeLike,
    query_positions: Int[Array, "B Q"] | None = None,
) -> PreAttention:
    """Of the residual stream `x` and one layer's weights; queries and MLP only at the places `at` of each row."""
    normed = norm(config, rules, x, weights["attn_norm"])
    k, v = _keys_values(config, rules, weights["attn"], normed, compute_dtype)
    if query_positions is not None:
        x, normed = take_positions(rules, x, query_positions), take_positions(rules, normed, query_positions)
    q = _queries(config, rules, weights["attn"], normed, compute_dtype)
    return PreAttention(q, k, v, _mlp(config, rules, weights, x, compute_dtype) if config.parallel_residual else None)


def decoder_layer(
    config: DecoderConfig,
    rules: ShardingRules,
    weights: Params,
    x: Float[Array, "B T D"],
    rotary: Rotary,
    attend: AttentionFn[State],
    compute_dtype: jax.typing.DTypeLike,
    *,
    at: Int[Array, "B Q"] | None = None,
    known: PreAttention | None = None,
) -> tuple[Float[Array, "B T D"] | Float[Array, "B Q D"], State]:
    """One layer. How queries meet keys (a causal mask, a cache) is the caller's `attend`.

    Args:
      at: only the queries at these places of each row are asked, and the result is that of these places.
      known: what `own` would find, where it is known already (without `at`).
    """
    pre = pre_attention(config, rules, weights, x, compute_dtype, at) if known is None else known
    k = apply_rotary(pre.k, rotary)
    if at is not None:
        x, rotary = take_positions(rules, x, at), Rotary(*(take_positions(rules, table, at) for table in rotary))
    context, state = attend(apply_rotary(pre.q, rotary), k, pre.v)
    axes = ("embed", "kv_heads", "q_per_kv", "head_dim")
    attention = dense(rules, weights["attn"]["o"], axes, 1, context, compute_dtype)
    if pre.mlp is not None:
        return x + attention + pre.mlp, state
    x = x + attention
    return x + _mlp(config, rules, weights, x, compute_dtype), state


def take_positions(
    rules: ShardingRules, x: Shaped[Array, "#B T ..."], at: Int[Array, "B Q"]
) -> Shaped[Array, "B Q ..."]:
    """x[b, at[b, q]]: the rows of each batch element that are named; every device takes from its own."""
    data = rules.spec(("batch",))
    x = jnp.broadcast_to(x, (at.shape[0], *x.shape[1:]), out_sharding=rules.sharding(("batch", *[None] * (x.ndim - 1))))

    @partial(jax.shard_map, in_specs=(data, data), out_specs=data)
    def take(x: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, jnp.expand_dims(at, range(2, x.ndim)), axis=1)

    return take(x, at)


def _queries(
    config: DecoderConfig, rules: ShardingRules, weights: Params, x: jax.Array, compute_dtype: jax.typing.DTypeLike
) -> jax.Array:
    q = dense(rules, weights["q"], ("kv_heads", "q_per_kv", "head_dim", "embed"), 3, x, compute_dtype)
    return rms_norm(q, weights["q_norm"]["scale"].astype(q.dtype), config.norm_eps) if config.qk_norm else q


def _keys_values(
    config: DecoderConfig, rules: ShardingRules, weights: Params, x: jax.Array, compute_dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    axes = ("kv_heads", "head_dim", "embed")
    k = dense(rules, weights["k"], axes, 2, x, compute_dtype)
    if config.qk_norm:
        k = rms_norm(k, weights["k_norm"]["scale"].astype(k.dtype), config.norm_eps)
    return k, dense(rules, weights["v"], axes, 2, x, compute_dtype)


def _mlp(
    config: DecoderConfig, rules: ShardingRules, weights: Params, x: jax.Array, compute_dtype: jax.typing.DTypeLike
) -> jax.Array:
    x = norm(config, rules, x, weights["mlp_norm"])
    weights = weights["mlp"]
    act = ACTIVATIONS[config.activation]
    hidden = dense(rules, weights["up"], ("mlp", "embed"), 1, x, compute_dtype)
    if config.gated_mlp:
        hidden = act(dense(rules, weights["gate"], ("mlp", "embed"), 1, x, compute_dtype)) * hidden
    else:
        hidden = act(hidden)
    return dense(rules, weights["down"], ("embed", "mlp"), 1, hidden, compute_dtype)


def layer_windows(config: DecoderConfig) -> np.ndarray | None:
    """Sliding window of each layer [L] int32 (a full layer gets one longer than any sequence), or None without any."""
    if config.sliding_window is None:
        return None
    return np.array([np.iinfo(np.int32).max if w is None else w for w in config.sliding_window], np.int32)


def scan_xs(config: DecoderConfig, params: Params) -> dict[str, Any]:
    """What the scan over layers walks along: the stacked weights and, where there are any, the windows."""
    windows = layer_windows(config)
    return {"weights": params["layers"]} | ({} if windows is None else {"window": jnp.asarray(windows)})


def layer_slice(inputs: dict[str, Any], index: jax.Array | int) -> dict[str, Any]:
    """What the scan over layers gives to layer `index`."""
    return jax.tree.map(lambda stacked: jax.lax.dynamic_index_in_dim(stacked, index, keepdims=False), inputs)


def embed(
    rules: ShardingRules, params: Params, tokens: Int[Array, "B T"], dtype: jax.typing.DTypeLike
) -> Float[Array, "B T D"]:
    """Rows of the embedding, in the type of the residual stream."""
    return embedding_lookup(rules, params["embed"]["embedding"], tokens, dtype)
