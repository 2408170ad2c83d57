"""The layers of a decoder, as pure functions of weights and activations.

One rule of numerics for every family: the residual stream, norms, rotary tables, softmax and logits are fp32;
`compute_dtype` is the type of matmul operands only (see `models.matmul`). Weights arrive as stored and are gathered
along `embed` where they are used, so that fsdp gathers one layer at a time inside the scan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.models.config import DecoderConfig, RopeConfig
from jax_selftrain.models.fsdp import embedding_lookup, unshard_param
from jax_selftrain.models.matmul import dense
from jax_selftrain.models.params import Params

State = TypeVar("State")

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def norm(config: DecoderConfig, rules: ShardingRules, x: Array, weights: Params) -> Array:
    """Apply LayerNorm or RMSNorm over the last dimension, in fp32.

    Args:
      x: [..., D].
      weights: `scale` [D] and, for LayerNorm, `bias` [D].
    """

    def unshard(name: str) -> Array:
        return unshard_param(rules, weights[name], ("embed",), x.dtype)

    if config.norm == "layernorm":
        centered = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
        return centered * jax.lax.rsqrt(variance + config.norm_eps) * unshard("scale") + unshard("bias")
    return rms_norm(x, unshard("scale"), config.norm_eps)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Return x / sqrt(mean(x²) + eps) · scale, over scale's dimensions."""
    axes = tuple(range(-scale.ndim, 0))
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True) + eps) * scale


def rope_frequencies(rope: RopeConfig, rotary_dim: int) -> tuple[np.ndarray, float]:
    """Compute rotary frequencies, rounded to fp32 in the steps of transformers.

    The last bit of a frequency times a position of thousands is an angle off by 1e-4.

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

        def find_dimension(rotations: float) -> float:
            span = math.log(rope.original_max_position / (rotations * 2 * math.pi))
            return rotary_dim * span / (2 * math.log(rope.theta))

        low, high = find_dimension(rope.beta_fast), find_dimension(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        span = high - low if high != low else 0.001
        ramp = (np.arange(rotary_dim // 2, dtype=f32) - f32(low)) / f32(span)
        extrapolation = 1 - np.clip(ramp, f32(0), f32(1))
        scale = rope.attention_factor if rope.attention_factor is not None else 0.1 * math.log(rope.factor) + 1.0
        interpolated = f32(1) / (f32(rope.factor) * powers)
        return interpolated * (1 - extrapolation) + frequencies * extrapolation, scale
    return frequencies, 1.0


class Rotary(NamedTuple):
    """Cosines and sines [B, T, rotary_dim/2], scaled by the attention factor.

    With `layer_ropes` [N, B, T, rotary_dim/2]: each layer selects one of N rotations.
    """

    cos: Array
    sin: Array

    def of_layer(self, inputs: Mapping[str, Any]) -> Rotary:
        """Select the rotation of a layer by its entry of `scan_xs`."""
        return layer_slice(self, inputs["rope"]) if "rope" in inputs else self


def _unique_ropes(config: DecoderConfig) -> list[RopeConfig | None]:
    return list(dict.fromkeys(config.layer_ropes or ()))


def rotary_tables(config: DecoderConfig, positions: Int[Array, "B T"], dtype: DTypeLike) -> Rotary:
    """Compute the rotation of each position."""

    def table(rope: RopeConfig | None) -> Rotary:
        if rope is None:
            frequencies, scale = np.zeros(config.rotary_dim // 2, np.float32), 1.0
        else:
            frequencies, scale = rope_frequencies(rope, config.rotary_dim)
        angles = positions[..., None].astype(dtype) * jnp.asarray(frequencies, dtype)
        return Rotary(jnp.cos(angles) * scale, jnp.sin(angles) * scale)

    if config.layer_ropes is None:
        return table(config.rope)
    return jax.tree.map(lambda *tables: jnp.stack(tables), *map(table, _unique_ropes(config)))


def apply_rotary(x: Array, rotary: Rotary) -> Array:
    """Rotate pairs (i, i + rotary_dim/2) of x [B, T, heads…, K]."""
    half = rotary.cos.shape[-1]
    if not half:
        return x
    heads = tuple(range(2, x.ndim - 1))
    cos, sin = jnp.expand_dims(rotary.cos, heads), jnp.expand_dims(rotary.sin, heads)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


AttentionFn = Callable[[Array, Array, Array], tuple[Array, State]]
"""(q [B, T, G, R, K], k [B, T, G, K], v [B, T, G, K]) → (context [B, T, G, R, K], state: a cache, say)."""


class PreAttention(NamedTuple):
    """Activations of a layer before attention."""

    x: Float[Array, "B T D"]
    """Input of the layer."""
    q: Float[Array, "B T G R K"] | None
    """Before rotation; None with k and v if they depend on the position."""
    k: Float[Array, "B T G K"] | None
    """Before rotation."""
    v: Float[Array, "B T G K"] | None
    mlp: Float[Array, "B T D"] | None
    """Output of the MLP with a parallel residual; else None."""


def pre_attention(
    config: DecoderConfig,
    rules: ShardingRules,
    weights: Params,
    x: Float[Array, "B T D"],
    compute_dtype: DTypeLike,
    query_positions: Int[Array, "B Q"] | None = None,
) -> PreAttention:
    """Compute keys, values, and the rest at `query_positions`."""
    normed, attn = x if config.post_norm else norm(config, rules, x, weights["attn_norm"]), weights["attn"]
    q_axes, kv_axes = ("kv_heads", "q_per_kv", "head_dim", "embed"), ("kv_heads", "head_dim", "embed")
    k = dense(rules, attn["k"], kv_axes, 2, normed, compute_dtype)
    if config.qk_norm:
        k = rms_norm(k, attn["k_norm"]["scale"].astype(k.dtype), config.norm_eps)
    v = dense(rules, attn["v"], kv_axes, 2, normed, compute_dtype)
    if query_positions is not None:
        x, normed = take_positions(rules, x, query_positions), take_positions(rules, normed, query_positions)
    q = dense(rules, attn["q"], q_axes, 3, normed, compute_dtype)
    if config.qk_norm:
        q = rms_norm(q, attn["q_norm"]["scale"].astype(q.dtype), config.norm_eps)
    if config.attention_scale is not None:
        q *= config.attention_scale * config.head_dim**0.5  # attention divides by √K
    mlp = _mlp(config, rules, weights, x, compute_dtype) if config.parallel_residual else None
    return PreAttention(x, q, k, v, mlp)


def decoder_layer(
    config: DecoderConfig,
    rules: ShardingRules,
    weights: Params,
    x: Float[Array, "B T D"] | PreAttention,
    rotary: Rotary,
    attend: AttentionFn[State],
    compute_dtype: DTypeLike,
    *,
    query_positions: Int[Array, "B Q"] | None = None,
) -> tuple[Float[Array, "B T D"] | Float[Array, "B Q D"], State]:
    """Apply one layer; `attend` applies a causal mask or a cache.

    Args:
      x: input of the layer, or its precomputed activations (without `query_positions`).
      query_positions: positions of the queries and of the result; default: all.
    """
    pre = x if isinstance(x, PreAttention) else pre_attention(config, rules, weights, x, compute_dtype, query_positions)
    if pre.q is None or pre.k is None or pre.v is None:
        raise ValueError("the activations of a first layer with learned positions are not precomputed")
    k = apply_rotary(pre.k, rotary)
    if query_positions is not None:
        rotary = Rotary(*(take_positions(rules, table, query_positions) for table in rotary))
    context, state = attend(apply_rotary(pre.q, rotary), k, pre.v)
    axes = ("embed", "kv_heads", "q_per_kv", "head_dim")
    attention = dense(rules, weights["attn"]["o"], axes, 1, context, compute_dtype)
    if pre.mlp is not None:
        return pre.x + attention + pre.mlp, state
    if config.post_norm:
        attention = norm(config, rules, attention, weights["attn_norm"])
    x = pre.x + attention
    return x + _mlp(config, rules, weights, x, compute_dtype), state


def take_positions(
    rules: ShardingRules, x: Shaped[Array, "#B T ..."], positions: Int[Array, "B Q"]
) -> Shaped[Array, "B Q ..."]:
    """Return x[b, positions[b, q]]; every device takes from its own shard."""
    data = rules.spec(("batch",))
    sharding = rules.sharding(("batch", *[None] * (x.ndim - 1)))
    x = jnp.broadcast_to(x, (positions.shape[0], *x.shape[1:]), out_sharding=sharding)

    @partial(jax.shard_map, in_specs=(data, data), out_specs=data)
    def take(x: Array, positions: Array) -> Array:
        return jnp.take_along_axis(x, jnp.expand_dims(positions, range(2, x.ndim)), axis=1)

    return take(x, positions)


def _mlp(config: DecoderConfig, rules: ShardingRules, weights: Params, x: Array, compute_dtype: DTypeLike) -> Array:
    x = x if config.post_norm else norm(config, rules, x, weights["mlp_norm"])
    mlp = weights["mlp"]
    act = ACTIVATIONS[config.activation]
    hidden = dense(rules, mlp["up"], ("mlp", "embed"), 1, x, compute_dtype)
    if config.gated_mlp:
        hidden = act(dense(rules, mlp["gate"], ("mlp", "embed"), 1, x, compute_dtype)) * hidden
    else:
        hidden = act(hidden)
    output = dense(rules, mlp["down"], ("embed", "mlp"), 1, hidden, compute_dtype)
    return norm(config, rules, output, weights["mlp_norm"]) if config.post_norm else output


def embed(
    config: DecoderConfig,
    rules: ShardingRules,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "#B T"],
    dtype: DTypeLike,
) -> Float[Array, "B T D"]:
    """Look up the embeddings of tokens and, if learned, of their positions."""
    x = embedding_lookup(rules, params["embed"]["embedding"], tokens, dtype)
    return add_positions(config, rules, params, x, positions)


def add_positions(
    config: DecoderConfig, rules: ShardingRules, params: Params, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]
) -> Float[Array, "B T D"]:
    """Add the embeddings of positions, if they are learned."""
    if not config.learned_positions:
        return x
    rows = unshard_param(rules, params["embed"]["positions"], ("positions", "embed"), x.dtype)
    axes = ("batch" if positions.shape[0] == x.shape[0] else None, None, None)
    return x + rows.at[positions].get(out_sharding=rules.sharding(axes))


def scan_xs(config: DecoderConfig, params: Params) -> dict[str, Any]:
    """Collect the inputs of the scan: weights, windows, numbers of rotations."""
    inputs: dict[str, Any] = {"weights": params["layers"]}
    if config.sliding_window is not None:
        unlimited = np.iinfo(np.int32).max
        windows = np.array([unlimited if window is None else window for window in config.sliding_window], np.int32)
        inputs["window"] = jnp.asarray(windows)
    if config.layer_ropes is not None:
        inputs["rope"] = jnp.asarray([_unique_ropes(config).index(rope) for rope in config.layer_ropes], jnp.int32)
    return inputs


def layer_slice(inputs: Any, index: Array | int) -> Any:
    """Select one layer of stacked arrays."""
    return jax.tree.map(lambda stacked: jax.lax.dynamic_index_in_dim(stacked, index, keepdims=False), inputs)
