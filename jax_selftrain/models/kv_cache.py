"""The key/value cache and its two writers: decoding steps and prefill.

The cache has two parts. The *tail* `[L, B, G, 32, K]` is written at one offset that all rows share; a full tail is
flushed behind the committed length of each row. *Committed* blocks `[L, blocks, B, G, S, K]` are read-only between two
flushes, so that no step copies them. Attention visits the tail and then the committed blocks one by one, with an online
softmax (Milakov & Gimelshein, arXiv:1805.02867). The number of visited blocks is a value, not a shape: one program
serves any length and reads only what is filled, and a block in which a row sees nothing leaves the row's bits unchanged
(its weights are exactly 0, the factor of the others exactly 1). A block stays in a CPU's cache between XLA's copy of it
and its use: attention of Pythia-70m, 32 rows × 256 positions, took 8 ms a step, with one large block 17 ms.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from jax_selftrain.distributed.sharding import Axes, ShardingRules
from jax_selftrain.models.attention import dot_product_attention
from jax_selftrain.models.config import DecoderConfig
from jax_selftrain.models.layers import decoder_layer, embed, layer_slice, norm, rotary_tables, scan_xs
from jax_selftrain.models.matmul import accumulation_dtype, mixed_precision_einsum
from jax_selftrain.models.params import Params

TAIL_LEN = 32
"""Tokens between two flushes."""

_TAIL_AXES = ("layers", "batch", "kv_heads", None, "head_dim")
_BLOCK_AXES = ("layers", None, "batch", "kv_heads", None, "head_dim")
_SCALE_AXES = _BLOCK_AXES[:-1]


class KVBlock(NamedTuple):
    """Keys and values [..., B, G, S, K], in int8 with scales.

    The scales are [..., B, G, S].
    """

    k: Any
    v: Any
    k_scale: Any = None
    v_scale: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of all layers."""

    committed: KVBlock
    """[L, blocks, B, G, S, …]."""
    tail: Any
    """(Keys, values), each [L, B, G, TAIL_LEN, K]."""

    @property
    def block_size(self) -> int:
        """S: positions in a committed block."""
        return self.committed.k.shape[4]

    @property
    def capacity(self) -> int:
        """Committed positions per row."""
        return self.committed.k.shape[1] * self.block_size


def init_cache(
    config: DecoderConfig,
    rules: ShardingRules,
    batch_size: int,
    capacity: int,
    dtype: DTypeLike = jnp.float32,
    *,
    committed_dtype: DTypeLike | None = None,
    block_size: int = TAIL_LEN,
) -> KVCache:
    """Create an empty cache.

    Args:
      batch_size: rows of all replicas.
      capacity: committed positions per row; rounded up to whole blocks.
      dtype: of the tail, and of committed blocks by default.
      committed_dtype: any float type, or int8.
      block_size: positions of a committed block, a multiple of TAIL_LEN.
    """
    if block_size % TAIL_LEN:
        raise ValueError(f"a block of {block_size} positions is not a multiple of the tail's {TAIL_LEN}")
    committed_dtype = dtype if committed_dtype is None else committed_dtype
    shape = (config.num_layers, -(-capacity // block_size), batch_size, config.num_kv_heads, block_size)
    tail_shape = (config.num_layers, batch_size, config.num_kv_heads, TAIL_LEN, config.head_dim)

    def zeros(shape: tuple[int, ...], dtype: DTypeLike, axes: Axes) -> Array:
        return jnp.zeros(shape, dtype, out_sharding=rules.sharding(axes))

    blocks = [zeros((*shape, config.head_dim), committed_dtype, _BLOCK_AXES) for _ in range(2)]
    is_float = jnp.issubdtype(committed_dtype, jnp.floating)
    scales = [None if is_float else zeros(shape, jnp.float32, _SCALE_AXES) for _ in range(2)]
    return KVCache(KVBlock(*blocks, *scales), tuple(zeros(tail_shape, dtype, _TAIL_AXES) for _ in range(2)))


def num_used_blocks(cache: KVCache, committed_len: Int[Array, " B"]) -> Int[Array, ""]:
    """Count the blocks of the longest row (an all-reduce over replicas)."""
    return (jnp.max(committed_len) + cache.block_size - 1) // cache.block_size


def decode_step(
    config: DecoderConfig,
    rules: ShardingRules,
    params: Params,
    cache: KVCache,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    committed_len: Int[Array, " B"],
    num_blocks: Int[Array, ""],
    offset: Int[Array, ""],
    *,
    compute_dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "B D"], KVCache]:
    """Feed one token per row.

    The result equals the last position of `forward` over all tokens of the row.

    Args:
      tokens, positions: the tokens and their rotary positions.
      committed_len: committed positions of each row.
      num_blocks: committed blocks to read, at least `num_used_blocks(cache, committed_len)`.
      offset: position in the tail to write, the same for all rows; earlier positions hold the row's latest tokens.

    Returns:
      Hidden state after the final norm, fp32, and the cache with the tail written at `offset`.
    """
    dtype = accumulation_dtype(compute_dtype)
    rotary = rotary_tables(config, positions[:, None], dtype)
    scale = config.head_dim**-0.5
    tail_age = offset - jnp.arange(TAIL_LEN, dtype=jnp.int32)[None]
    block_index = jnp.arange(cache.block_size, dtype=jnp.int32)

    def layer(carry: tuple[Array, Any], inputs: dict) -> tuple[tuple, None]:
        x, tail = carry
        index = inputs["index"]

        def is_visible(age: Array, is_filled: Array) -> Array:
            return is_filled & (age < inputs["window"]) if "window" in inputs else is_filled

        def write(stored: Array, new: Float[Array, "B 1 G K"]) -> Array:
            entry = jnp.transpose(new, (1, 0, 2, 3))[:, :, :, None].astype(stored.dtype)
            return jax.lax.dynamic_update_slice(stored, entry, (index, 0, 0, offset, 0))

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
            new_tail = jax.tree.map(write, tail, (k, v))
            query = q[:, 0] * scale

            def add_block(n: Array, softmax: _OnlineSoftmax) -> _OnlineSoftmax:
                position = n * cache.block_size + block_index[None]
                visible = is_visible(committed_len[:, None] + offset - position, position < committed_len[:, None])
                block = _committed_block(cache, index, n)
                return _merge_softmax(softmax, _attend_to_block(query, block, visible, compute_dtype))

            newest = KVBlock(*layer_slice(new_tail, index))
            softmax = _attend_to_block(query, newest, is_visible(tail_age, tail_age >= 0), compute_dtype)
            softmax = jax.lax.fori_loop(0, num_blocks, add_block, softmax)
            return (softmax.context / softmax.denom[..., None])[:, None], new_tail

        layer_rotary = rotary.of_layer(inputs)
        return decoder_layer(config, rules, inputs["weights"], x, layer_rotary, attend, compute_dtype), None

    x = embed(config, rules, params, tokens[:, None], positions[:, None], dtype)
    inputs = scan_xs(config, params) | {"index": jnp.arange(config.num_layers, dtype=jnp.int32)}
    (x, tail), _ = jax.lax.scan(layer, (x, cache.tail), inputs)
    return norm(config, rules, x[:, 0], params["final_norm"]), replace(cache, tail=tail)


def flush_tail(rules: ShardingRules, cache: KVCache, committed_len: Int[Array, " B"]) -> KVCache:
    """Write the tail behind the committed positions of each row.

    The caller adds TAIL_LEN to `committed_len`. Each device updates its own rows in place, one by one.
    """
    blocks, scales, tails = rules.spec(_BLOCK_AXES), rules.spec(_SCALE_AXES), rules.spec(_TAIL_AXES)
    scale = None if cache.committed.k_scale is None else scales
    specs = KVCache(KVBlock(blocks, blocks, scale, scale), (tails, tails))

    @partial(jax.shard_map, in_specs=(specs, rules.spec(("batch",))), out_specs=specs)
    def flush(cache: KVCache, committed_len: Array) -> KVCache:
        (k, k_scale), (v, v_scale) = (_quantize(tail, cache.committed.k.dtype) for tail in cache.tail)

        def flush_row(b: Array, committed: KVBlock) -> KVBlock:
            position = jax.lax.dynamic_index_in_dim(committed_len, b, keepdims=False)
            start = (0, position // cache.block_size, b, 0, position % cache.block_size, 0)

            def write(old: Array, tail: Array) -> Array:
                row = jax.lax.dynamic_slice_in_dim(tail, b, 1, axis=1)[:, None]
                return jax.lax.dynamic_update_slice(old, row, start[: old.ndim])

            return jax.tree.map(write, committed, KVBlock(k, v, k_scale, v_scale))

        return replace(cache, committed=jax.lax.fori_loop(0, committed_len.shape[0], flush_row, cache.committed))

    return flush(cache, committed_len)


def prefill(
    config: DecoderConfig,
    rules: ShardingRules,
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    *,
    compute_dtype: DTypeLike = jnp.float32,
) -> KVCache:
    """Fill the first T committed positions by one forward pass.

    The caller passes the number of valid positions (whole tails) as `committed_len`; later flushes overwrite padding.

    Args:
      cache: empty, with room for T tokens.
      tokens: prompts, padded on the right.
    """
    dtype = accumulation_dtype(compute_dtype)
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    distance = index[:, None] - index[None, :]
    rotary = rotary_tables(config, index[None], dtype)

    def layer(x: Array, inputs: dict) -> tuple[Array, tuple[Array, Array]]:
        mask = (distance >= 0) & (distance < inputs["window"]) if "window" in inputs else distance >= 0

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
            return dot_product_attention(q, k, v, mask[None], compute_dtype), (k, v)

        return decoder_layer(config, rules, inputs["weights"], x, rotary.of_layer(inputs), attend, compute_dtype)

    x = embed(config, rules, params, tokens, index[None], dtype)
    _, keys_and_values = jax.lax.scan(layer, x, scan_xs(config, params))
    (k, k_scale), (v, v_scale) = (_quantize(stacked, cache.committed.k.dtype) for stacked in keys_and_values)
    return replace(cache, committed=jax.tree.map(partial(_to_blocks, cache), KVBlock(k, v, k_scale, v_scale)))


def _to_blocks(cache: KVCache, stacked: Shaped[Array, "L B T G ..."]) -> Shaped[Array, "L blocks B G S ..."]:
    layers, rows, length, heads, *width = stacked.shape
    blocks = -(-length // cache.block_size)
    padded = _pad_axis(stacked, 2, blocks * cache.block_size)
    split = padded.reshape(layers, rows, blocks, cache.block_size, heads, *width)
    ordered = jnp.transpose(split, (0, 2, 1, 4, 3, *range(5, split.ndim)))
    return _pad_axis(ordered, 1, cache.committed.k.shape[1])


def _pad_axis(array: Array, axis: int, length: int) -> Array:
    return jnp.pad(array, [(0, length - size if dim == axis else 0) for dim, size in enumerate(array.shape)])


class _OnlineSoftmax(NamedTuple):
    """Attention over a subset of the keys, mergeable with others."""

    max: Float[Array, "B G R"]
    """Largest score."""
    denom: Float[Array, "B G R"]
    """Sum of exp(score − max)."""
    context: Float[Array, "B G R K"]
    """Values weighted by exp(score − max)."""


def _attend_to_block(
    query: Float[Array, "B G R K"], block: KVBlock, visible: Bool[Array, "#B S"], compute_dtype: DTypeLike
) -> _OnlineSoftmax:
    scores = mixed_precision_einsum("bgrk,bgsk->bgrs", query, block.k, compute_dtype)
    if block.k_scale is not None:
        scores = scores * block.k_scale[:, :, None]
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(scores.dtype).min)
    max_score = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - max_score[..., None])
    denom = jnp.sum(weights, axis=-1)
    if block.v_scale is not None:
        weights = weights * block.v_scale[:, :, None]
    context = mixed_precision_einsum("bgrs,bgsk->bgrk", weights, block.v, compute_dtype)
    return _OnlineSoftmax(max_score, denom, context)


def _merge_softmax(a: _OnlineSoftmax, b: _OnlineSoftmax) -> _OnlineSoftmax:
    """Merge two softmaxes; one that saw nothing leaves the other's bits."""
    max_score = jnp.maximum(a.max, b.max)
    a_factor, b_factor = jnp.exp(a.max - max_score), jnp.exp(b.max - max_score)
    context = a.context * a_factor[..., None] + b.context * b_factor[..., None]
    return _OnlineSoftmax(max_score, a.denom * a_factor + b.denom * b_factor, context)


def _committed_block(cache: KVCache, layer: Array, n: Array) -> KVBlock:
    def read(stacked: Array) -> Array:
        shape = stacked.shape[2:]
        return jax.lax.dynamic_slice(stacked, (layer, n, *[0] * len(shape)), (1, 1, *shape))[0, 0]

    return jax.tree.map(read, cache.committed)


def _quantize(tail: Array, dtype: DTypeLike) -> tuple[Array, Array | None]:
    """Cast the tail; int8 maps each head's largest magnitude to ±127."""
    if jnp.issubdtype(dtype, jnp.floating):
        return tail.astype(dtype), None
    scale = jnp.max(jnp.abs(tail), axis=-1).astype(jnp.float32) / 127
    steps = tail.astype(jnp.float32) / jnp.where(scale == 0, 1.0, scale)[..., None]
    return jnp.round(steps).astype(dtype), scale
