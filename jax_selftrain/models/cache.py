"""Decoding one token per row and step, starting from BOS: a settled cache and a page.

BOS-only sampling needs no prefill, no padding and no page table. What past tokens left behind lies in two parts:

* *settled* `[L, C, G, B, K]`, read-only while a page is being filled, so that no step copies it;
* the *page* `[L, 32, G, B, K]`, written at one offset that all rows share, and flushed behind each row's own settled
  part when it is full.

With time ahead of the batch a write touches contiguous memory (with `[L, B, T, G, K]` the TPU compiler inserted four
whole-cache copies). Rows may have settled parts of different lengths: slots at or beyond a row's own are invisible.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_selftrain.mesh import Layout
from jax_selftrain.models.config import DecoderConfig
from jax_selftrain.models.decoder import embed
from jax_selftrain.models.layers import (
    accumulation_dtype,
    block,
    contract,
    normalise,
    rotary_tables,
    scan_inputs,
    softmax_of,
)
from jax_selftrain.models.parameters import Params

PAGE = 32
"""Tokens between two flushes."""

_AXES = ("layers", None, "kv_heads", "batch", "head_dim")


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "page_k", "page_v"], meta_fields=[])
class Cache:
    """Keys and values: settled `k`, `v` [L, C, G, B, K] and `page_k`, `page_v` [L, PAGE, G, B, K]."""

    def __init__(self, k: jax.Array, v: jax.Array, page_k: jax.Array, page_v: jax.Array):
        self.k, self.v, self.page_k, self.page_v = k, v, page_k, page_v

    @property
    def capacity(self) -> int:
        """C: settled slots per row."""
        return self.k.shape[1]


def init_cache(
    config: DecoderConfig, layout: Layout, rows: int, capacity: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> Cache:
    """An empty cache for `rows` rows (over all replicas of the mesh) with `capacity` settled slots each."""

    def zeros(slots: int) -> jax.Array:
        shape = (config.num_layers, slots, config.num_kv_heads, rows, config.head_dim)
        return jnp.zeros(shape, dtype, out_sharding=layout.sharding(_AXES))

    return Cache(zeros(capacity), zeros(capacity), zeros(PAGE), zeros(PAGE))


def decode_step(
    config: DecoderConfig,
    layout: Layout,
    params: Params,
    cache: Cache,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    settled: Int[Array, " B"] | Int[Array, ""],
    offset: Int[Array, ""],
    *,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[Float[Array, "B D"], Cache]:
    """Feed one token per row; equal to the last position of `forward` over everything the row was fed.

    Args:
      tokens, positions: the tokens and their rotary positions.
      settled: how many settled slots of each row are filled.
      offset: slot of the page to write, the same for all rows; slots before it are the row's latest tokens.

    Returns:
      Hidden state after the final norm, fp32, and the cache with the page written at `offset`.
    """
    dtype = accumulation_dtype(compute_dtype)
    rotary = rotary_tables(config, positions[:, None], dtype)
    slots = jnp.arange(cache.capacity, dtype=jnp.int32)
    pages = jnp.arange(PAGE, dtype=jnp.int32)
    filled = jnp.broadcast_to(settled, tokens.shape)[:, None] if jnp.ndim(settled) == 0 else settled[:, None]
    distance = jnp.concatenate(
        [jnp.broadcast_to(filled + offset - slots, (len(tokens), cache.capacity)), _rows_of(offset - pages, filled)],
        axis=1,
    )
    visible = jnp.concatenate([slots < filled, _rows_of(offset - pages, filled) >= 0], axis=1)

    def layer(carry: tuple[jax.Array, jax.Array, jax.Array], inputs: dict) -> tuple[tuple, None]:
        x, page_k, page_v = carry
        seen = visible & (distance < inputs["window"]) if "window" in inputs else visible

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            start = (inputs["index"], offset, 0, 0, 0)
            written_k = jax.lax.dynamic_update_slice(page_k, _slot(k, page_k.dtype), start)
            written_v = jax.lax.dynamic_update_slice(page_v, _slot(v, page_v.dtype), start)
            here_k = jax.lax.dynamic_index_in_dim(written_k, inputs["index"], 0, keepdims=False)
            here_v = jax.lax.dynamic_index_in_dim(written_v, inputs["index"], 0, keepdims=False)
            past = contract("btgrk,cgbk->bgrc", q, inputs["k"], compute_dtype)
            recent = contract("btgrk,cgbk->bgrc", q, here_k, compute_dtype)
            scores = jnp.concatenate([past, recent], axis=-1)
            probabilities = softmax_of(scores, seen[:, None, None], head_dim=config.head_dim)
            context = contract("bgrc,cgbk->bgrk", probabilities[..., : cache.capacity], inputs["v"], compute_dtype)
            context += contract("bgrc,cgbk->bgrk", probabilities[..., cache.capacity :], here_v, compute_dtype)
            return context[:, None], (written_k, written_v)

        x, (page_k, page_v) = block(config, layout, inputs["weights"], x, rotary, attend, compute_dtype)
        return (x, page_k, page_v), None

    x = embed(layout, params, tokens[:, None], dtype)
    inputs = scan_inputs(config, params) | {
        "k": cache.k,
        "v": cache.v,
        "index": jnp.arange(config.num_layers, dtype=jnp.int32),
    }
    (x, page_k, page_v), _ = jax.lax.scan(layer, (x, cache.page_k, cache.page_v), inputs)
    hidden = normalise(config, layout, x[:, 0], params["final_norm"])
    return hidden, Cache(cache.k, cache.v, page_k, page_v)


def flush_page(layout: Layout, cache: Cache, settled: Int[Array, " B"] | Int[Array, ""]) -> Cache:
    """Write the whole page behind each row's settled part; the caller then counts PAGE more settled slots.

    A pass over the settled cache once per page, by selection rather than scatter: rows at different lengths cost the
    same as rows at one.
    """
    if jnp.ndim(settled) == 0:
        start = (0, settled, 0, 0, 0)
        k = jax.lax.dynamic_update_slice(cache.k, cache.page_k, start)
        v = jax.lax.dynamic_update_slice(cache.v, cache.page_v, start)
        return Cache(k, v, cache.page_k, cache.page_v)
    slot = jnp.arange(cache.capacity, dtype=jnp.int32)[:, None] - settled[None, :]
    inside = ((slot >= 0) & (slot < PAGE))[None, :, None, :, None]
    # settled slot c takes page slot (c − settled) mod PAGE
    wanted = (slot % PAGE)[None, :, None, :, None]

    def written(old: jax.Array, page: jax.Array) -> jax.Array:
        picked = jnp.take_along_axis(page, jnp.broadcast_to(wanted, (1, cache.capacity, 1, page.shape[3], 1)), axis=1)
        return jnp.where(inside, picked, old)

    return Cache(written(cache.k, cache.page_k), written(cache.v, cache.page_v), cache.page_k, cache.page_v)


def grow_cache(layout: Layout, cache: Cache, capacity: int) -> Cache:
    """The same cache with room for `capacity` settled slots per row."""

    def grown(old: jax.Array) -> jax.Array:
        return jnp.pad(old, [(0, 0), (0, capacity - old.shape[1]), (0, 0), (0, 0), (0, 0)])

    return Cache(grown(cache.k), grown(cache.v), cache.page_k, cache.page_v)


def _slot(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """One token's keys or values [B, 1, G, K] as a slot of the page [1, 1, G, B, K]."""
    return jnp.transpose(x, (1, 2, 0, 3))[None].astype(dtype)


def _rows_of(row: jax.Array, like: jax.Array) -> jax.Array:
    """A row of PAGE values, repeated for every row of the batch (and sharded as the batch is)."""
    return row + jnp.zeros_like(like)
