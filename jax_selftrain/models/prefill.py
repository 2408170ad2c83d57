"""Filling the cache with a whole prompt by one forward pass, for rows that do not start from BOS alone.

Rows are of any length and padded on the right. What the padding leaves behind lies past the end of a row's settled
part, where no step looks before a page has been flushed over it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.models.attention import dot_product_attention
from jax_selftrain.models.config import DecoderConfig
from jax_selftrain.models.kv_cache import KVCache
from jax_selftrain.models.layers import decoder_layer, embed, rotary_tables, scan_xs
from jax_selftrain.models.matmul import accumulation_dtype
from jax_selftrain.models.params import Params


def prefill(
    config: DecoderConfig,
    rules: ShardingRules,
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "B P"],
    *,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
) -> KVCache:
    """Keys and values of every prompt token in the first P settled slots of each row.

    How many of them count is what the caller passes to `decode_step` as `settled` (whole pages).

    Args:
      cache: empty, with a settled part of a float type and room for P tokens.
      tokens: prompts, padded on the right.
    """
    dtype = accumulation_dtype(compute_dtype)
    length = tokens.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)
    distance = index[:, None] - index[None, :]
    rotary = rotary_tables(config, index[None], dtype)

    def layer(x: jax.Array, inputs: dict) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        seen = (distance >= 0) & (distance < inputs["window"]) if "window" in inputs else distance >= 0

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            return dot_product_attention(q, k, v, seen[None], compute_dtype), (k, v)

        return decoder_layer(config, rules, inputs["weights"], x, rotary, attend, compute_dtype)

    x = embed(rules, params, tokens, dtype)
    _, (keys, values) = jax.lax.scan(layer, x, scan_xs(config, params))
    return KVCache(_to_blocks(cache, keys), _to_blocks(cache, values), None, None, cache.page_k, cache.page_v)


def _to_blocks(cache: KVCache, stacked: jax.Array) -> jax.Array:
    """[L, B, P, G, K] as settled blocks [L, N, B, G, S, K]."""
    layers, rows, length, heads, width = stacked.shape
    blocks = -(-length // cache.block)
    padded = jnp.pad(stacked, ((0, 0), (0, 0), (0, blocks * cache.block - length), (0, 0), (0, 0)))
    split = padded.reshape(layers, rows, blocks, cache.block, heads, width)
    ordered = jnp.transpose(split, (0, 2, 1, 4, 3, 5)).astype(cache.k.dtype)
    return jnp.pad(ordered, ((0, 0), (0, cache.k.shape[1] - blocks), *[(0, 0)] * 4))
