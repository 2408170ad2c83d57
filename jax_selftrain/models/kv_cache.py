"""Decoding one token per row and step, starting from BOS: settled blocks and a page.

BOS-only sampling needs no prefill, no padding and no page table. What past tokens left behind lies in two parts:

* the *page* `[L, B, G, 32, K]`, written at one offset that all rows share, and flushed behind each row's own settled
  part when it is full;
* *settled* blocks `[L, N, B, G, S, K]`, read-only while a page is being filled, so that no step copies them.

Attention starts with the page and then takes in the settled blocks one by one, oldest first, carrying the softmax's
maximum and sum along (Milakov & Gimelshein, arXiv:1805.02867). How many blocks are visited is a value, not a shape:

* attention reads what has been filled and no more, by one compiled program for any length;
* a block in which a row sees nothing changes none of its bits (its weights are exactly 0, the others' factor exactly
  1), so that a row's numbers do not depend on how long its neighbors are, nor on the capacity;
* a block is small enough to stay in a CPU's cache between the copy that XLA makes of it and its use: for the shape of
  Pythia-70m, 32 rows and 256 positions, attention took 8 ms a step, with the settled part whole 17 ms, and 55 ms where
  time came before the batch (XLA then transposes it every step).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.models.config import DecoderConfig
from jax_selftrain.models.layers import decoder_layer, embed, norm, rotary_tables, scan_xs
from jax_selftrain.models.matmul import accumulation_dtype, mixed_precision_einsum
from jax_selftrain.models.params import Params

TAIL_LEN = 32
"""Tokens between two flushes."""

_PAGE_AXES = ("layers", "batch", "kv_heads", None, "head_dim")
_BLOCK_AXES = ("layers", None, "batch", "kv_heads", None, "head_dim")
_SCALE_AXES = _BLOCK_AXES[:-1]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "k_scale", "v_scale", "page_k", "page_v"],
    meta_fields=[],
)
class KVCache:
    """Keys and values: settled `k`, `v` [L, N, B, G, S, K] and `page_k`, `page_v` [L, B, G, PAGE, K].

    With settled parts in int8, `k_scale`, `v_scale` [L, N, B, G, S] are what they are to be multiplied by; else None.
    """

    def __init__(self, k, v, k_scale, v_scale, page_k, page_v):
        self.k, self.v, self.k_scale, self.v_scale, self.page_k, self.page_v = k, v, k_scale, v_scale, page_k, page_v

    @property
    def block(self) -> int:
        """S: slots of a settled block."""
        return self.k.shape[4]

    @property
    def capacity(self) -> int:
        """Settled slots per row."""
        return self.k.shape[1] * self.block

    def with_tail(self, page_k: jax.Array, page_v: jax.Array) -> KVCache:
        """The same settled part with another page."""
        return KVCache(self.k, self.v, self.k_scale, self.v_scale, page_k, page_v)


def init_cache(
    config: DecoderConfig,
    rules: ShardingRules,
    rows: int,
    capacity: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    settled_dtype: jax.typing.DTypeLike | None = None,
    block: int = TAIL_LEN,
) -> KVCache:
    """An empty cache for `rows` rows (over all replicas of the mesh).

    Args:
      capacity: settled slots that each row needs; rounded up to whole blocks.
      dtype: of the page, and of the settled part unless `settled_dtype` (any float, or int8) says otherwise.
      block: slots of a settled block, a multiple of PAGE.
    """
    if block % TAIL_LEN:
        raise ValueError(f"a settled block of {block} slots does not hold whole pages of {TAIL_LEN}")
    settled_dtype = dtype if settled_dtype is None else settled_dtype
    shape = (config.num_layers, -(-capacity // block), rows, config.num_kv_heads, block, config.head_dim)

    def committed_len() -> jax.Array:
        return jnp.zeros(shape, settled_dtype, out_sharding=rules.sharding(_BLOCK_AXES))

    def scale() -> jax.Array | None:
        if jnp.issubdtype(settled_dtype, jnp.floating):
            return None
        return jnp.zeros(shape[:-1], jnp.float32, out_sharding=rules.sharding(_SCALE_AXES))

    def page() -> jax.Array:
        page_shape = (config.num_layers, rows, config.num_kv_heads, TAIL_LEN, config.head_dim)
        return jnp.zeros(page_shape, dtype, out_sharding=rules.sharding(_PAGE_AXES))

    return KVCache(committed_len(), committed_len(), scale(), scale(), page(), page())


def num_used_blocks(cache: KVCache, settled: Int[Array, " B"]) -> Int[Array, ""]:
    """How many settled blocks the longest row fills. (On several replicas they must agree: once a page, not a step.)"""
    return (jnp.max(settled) + cache.block - 1) // cache.block


def decode_step(
    config: DecoderConfig,
    rules: ShardingRules,
    params: Params,
    cache: KVCache,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    settled: Int[Array, " B"],
    blocks: Int[Array, ""],
    offset: Int[Array, ""],
    *,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[Float[Array, "B D"], KVCache]:
    """Feed one token per row; equal to the last position of `forward` over everything the row was fed.

    Args:
      tokens, positions: the tokens and their rotary positions.
      settled: how many settled slots of each row are filled.
      blocks: settled blocks to read, at least `filled_blocks(cache, settled)`.
      offset: slot of the page to write, the same for all rows; slots before it are the row's latest tokens.

    Returns:
      Hidden state after the final norm, fp32, and the cache with the page written at `offset`.
    """
    dtype = accumulation_dtype(compute_dtype)
    rotary = rotary_tables(config, positions[:, None], dtype)
    scale = config.head_dim**-0.5
    page_age = offset - jnp.arange(TAIL_LEN, dtype=jnp.int32)[None]
    slots = jnp.arange(cache.block, dtype=jnp.int32)

    def layer(carry: tuple[jax.Array, jax.Array, jax.Array], inputs: dict) -> tuple[tuple, None]:
        x, page_k, page_v = carry
        index = inputs["index"]

        def seen(age: jax.Array, exists: jax.Array) -> jax.Array:
            return exists & (age < inputs["window"]) if "window" in inputs else exists

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            at = (index, 0, 0, offset, 0)
            written_k = jax.lax.dynamic_update_slice(page_k, _quantise_entry(k, page_k.dtype), at)
            written_v = jax.lax.dynamic_update_slice(page_v, _quantise_entry(v, page_v.dtype), at)
            query = q[:, 0] * scale
            recent = _KVBlock(_layer_slice(written_k, index), _layer_slice(written_v, index), None, None)

            def older(n: jax.Array, state: _OnlineSoftmax) -> _OnlineSoftmax:
                slot = n * cache.block + slots[None]
                visible = seen(settled[:, None] + offset - slot, slot < settled[:, None])
                return _merge_softmax(
                    state, _attention(query, _committed_block(cache, index, n), visible, compute_dtype)
                )

            state = _attention(query, recent, seen(page_age, page_age >= 0), compute_dtype)
            state = jax.lax.fori_loop(0, blocks, older, state)
            return (state.context / state.denom[..., None])[:, None], (written_k, written_v)

        x, (page_k, page_v) = decoder_layer(config, rules, inputs["weights"], x, rotary, attend, compute_dtype)
        return (x, page_k, page_v), None

    x = embed(rules, params, tokens[:, None], dtype)
    inputs = scan_xs(config, params) | {"index": jnp.arange(config.num_layers, dtype=jnp.int32)}
    (x, page_k, page_v), _ = jax.lax.scan(layer, (x, cache.page_k, cache.page_v), inputs)
    hidden = norm(config, rules, x[:, 0], params["final_norm"])
    return hidden, cache.with_tail(page_k, page_v)


def flush_tail(rules: ShardingRules, cache: KVCache, settled: Int[Array, " B"]) -> KVCache:
    """Write the whole page behind each row's settled part (whole pages); the caller then counts PAGE more.

    Row by row and in place, on each device its own rows: nothing but the page is read or written.
    """
    blocks, scales, pages = rules.spec(_BLOCK_AXES), rules.spec(_SCALE_AXES), rules.spec(_PAGE_AXES)
    scale = None if cache.k_scale is None else scales
    specs = KVCache(blocks, blocks, scale, scale, pages, pages)

    @partial(jax.shard_map, in_specs=(specs, rules.spec(("batch",))), out_specs=specs)
    def flush(cache: KVCache, settled: jax.Array) -> KVCache:
        new_k, new_k_scale = _quantized(cache.page_k, cache.k)
        new_v, new_v_scale = _quantized(cache.page_v, cache.v)

        def row(b: jax.Array, into: tuple) -> tuple:
            start = jax.lax.dynamic_index_in_dim(settled, b, keepdims=False)
            at = (0, start // cache.block, b, 0, start % cache.block, 0)

            def written(old: jax.Array, page: jax.Array) -> jax.Array:
                mine = jax.lax.dynamic_slice_in_dim(page, b, 1, axis=1)[:, None]
                return jax.lax.dynamic_update_slice(old, mine, at[: old.ndim])

            return jax.tree.map(written, into, (new_k, new_v, new_k_scale, new_v_scale))

        whole = (cache.k, cache.v, cache.k_scale, cache.v_scale)
        k, v, k_scale, v_scale = jax.lax.fori_loop(0, settled.shape[0], row, whole)
        return KVCache(k, v, k_scale, v_scale, cache.page_k, cache.page_v)

    return flush(cache, settled)


class _KVBlock(NamedTuple):
    """Keys and values [B, G, S, K] of one layer, and what to multiply them by [B, G, S] (None: 1)."""

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None
    v_scale: jax.Array | None


class _OnlineSoftmax(NamedTuple):
    """Attention over part of the past: enough to join it with attention over another part."""

    max: Float[Array, "B G R"]
    """Largest score."""
    denom: Float[Array, "B G R"]
    """Sum of exp(score − top)."""
    context: Float[Array, "B G R K"]
    """Values weighted by exp(score − top)."""


def _attention(
    query: Float[Array, "B G R K"],
    kv_blocks: _KVBlock,
    visible: Bool[Array, "#B S"],
    compute_dtype: jax.typing.DTypeLike,
) -> _OnlineSoftmax:
    scores = mixed_precision_einsum("bgrk,bgsk->bgrs", query, kv_blocks.k, compute_dtype)
    if kv_blocks.k_scale is not None:
        scores = scores * kv_blocks.k_scale[:, :, None]
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(scores.dtype).min)
    top = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - top[..., None])
    total = jnp.sum(weights, axis=-1)
    if kv_blocks.v_scale is not None:
        weights = weights * kv_blocks.v_scale[:, :, None]
    return _OnlineSoftmax(top, total, mixed_precision_einsum("bgrs,bgsk->bgrk", weights, kv_blocks.v, compute_dtype))


def _merge_softmax(a: _OnlineSoftmax, b: _OnlineSoftmax) -> _OnlineSoftmax:
    """Over both parts. Where one of them saw nothing (its top is the smallest number), the other's own bits."""
    top = jnp.maximum(a.max, b.max)
    of_a, of_b = jnp.exp(a.max - top), jnp.exp(b.max - top)
    context = a.context * of_a[..., None] + b.context * of_b[..., None]
    return _OnlineSoftmax(top, a.denom * of_a + b.denom * of_b, context)


def _committed_block(cache: KVCache, layer: jax.Array, n: jax.Array) -> _KVBlock:
    """Block `n` of one layer."""

    def read(whole: jax.Array) -> jax.Array:
        rest = whole.shape[2:]
        return jax.lax.dynamic_slice(whole, (layer, n, *[0] * len(rest)), (1, 1, *rest))[0, 0]

    k_scale, v_scale = jax.tree.map(read, (cache.k_scale, cache.v_scale))  # None stays None
    return _KVBlock(read(cache.k), read(cache.v), k_scale, v_scale)


def _quantized(page: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The page in the type of the settled part, and its scale: the largest magnitude of each token's head is ±127."""
    if jnp.issubdtype(like.dtype, jnp.floating):
        return page.astype(like.dtype), None
    scale = jnp.max(jnp.abs(page), axis=-1).astype(jnp.float32) / 127
    steps = page.astype(jnp.float32) / jnp.where(scale == 0, 1.0, scale)[..., None]
    return jnp.round(steps).astype(like.dtype), scale


def _quantise_entry(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """One token's keys or values [B, 1, G, K] as a slot of the page [1, B, G, 1, K]."""
    return jnp.transpose(x, (1, 0, 2, 3))[:, :, :, None].astype(dtype)


def _layer_slice(stacked: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, layer, 0, keepdims=False)
