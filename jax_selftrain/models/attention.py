"""Attention over whole rows, for training and scoring: written out, or as one fused kernel.

The written-out form runs everywhere and is the reference. On a TPU, bfloat16 training takes JAX's own splash attention
(`jax.experimental.pallas.ops.tpu.splash_attention`), a flash kernel (arXiv:2205.14135) that knows causal masks,
documents and grouped queries: scores never leave the chip's fast memory, and tiles that no query may see are skipped.
It multiplies in bfloat16 and keeps the softmax in fp32, as the written-out form does; fp32 operands are left to the
latter, since the kernel's products would round them to bfloat16.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jax_selftrain.distributed.mesh import mesh_platform
from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.models.config import DecoderConfig
from jax_selftrain.models.matmul import mixed_precision_einsum

BLOCK_SIZES = (512, 256, 128)
"""Sides of a kernel's tiles, in tokens; the largest that divides the row is taken."""


def can_use_splash(
    config: DecoderConfig, rules: ShardingRules, length: int, compute_dtype: jax.typing.DTypeLike
) -> bool:
    """Whether there is a fused kernel for rows of `length` tokens: on a TPU, in bfloat16, without sliding windows."""
    return (
        mesh_platform(rules.mesh) == "tpu"
        and jnp.dtype(compute_dtype) == jnp.bfloat16
        and config.sliding_window is None
        and length % BLOCK_SIZES[-1] == 0
    )


def splash_attention(
    rules: ShardingRules,
    q: Float[Array, "B T G R K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    segments: Int[Array, "B T"] | None,
    compute_dtype: jax.typing.DTypeLike,
    *,
    interpret: bool = False,
) -> Float[Array, "B T G R K"]:
    """Causal attention within each document (`segments`; None: one document a row) by a kernel for TPUs.

    Each device attends with its own heads over its own rows. `interpret` runs the kernel step by step on any device,
    for tests.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length = q.shape[1]
    tile = next(tile for tile in BLOCK_SIZES if length % tile == 0)
    tiles = splash.BlockSizes(tile, tile, tile, tile, tile, tile, tile, tile)  # forward; backward of keys; of queries
    queries, keys = ("batch", None, "kv_heads", "q_per_kv", None), ("batch", None, "kv_heads", None)
    specs = rules.spec(queries), rules.spec(keys), rules.spec(keys), rules.spec(("batch", None))

    # The kernel says nothing about which mesh axes its outputs vary over, so that JAX cannot check it.
    @partial(jax.shard_map, in_specs=specs, out_specs=specs[0], check_vma=False)
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        heads = q.shape[2] * q.shape[3]
        mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
        kernel = splash.make_splash_mha_single_device(mask, block_sizes=tiles, interpret=interpret)
        by_head = jnp.moveaxis(q.reshape(*q.shape[:2], heads, -1), 1, 2), jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
        context = jax.vmap(kernel)(*by_head, splash.SegmentIds(segments, segments))
        return jnp.moveaxis(context, 2, 1).reshape(q.shape)

    if segments is None:
        segments = jax.reshard(jnp.zeros(q.shape[:2], jnp.int32), specs[3])
    operands = (x.astype(compute_dtype) for x in (q * q.shape[-1] ** -0.5, k, v))
    return attend(*operands, segments).astype(q.dtype)


@partial(
    jax.checkpoint, static_argnums=(4,), policy=jax.checkpoint_policies.save_only_these_names("attention over values")
)
def dot_product_attention(
    q: Float[Array, "B T G R K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    mask: Bool[Array, "#B T S"],
    compute_dtype: jax.typing.DTypeLike,
) -> Float[Array, "B T G R K"]:
    """The written-out form, the reference: softmax(q kᵀ / √K) v over the visible positions.

    Weights are divided by their sum after they have met the values, so that the backward pass has no sum over [T, S]
    either; and no array of that shape is kept for it: the weights, not their product with the values, are computed
    again.
    """
    scores = mixed_precision_einsum("btgrk,bsgk->bgrts", q * q.shape[-1] ** -0.5, k, compute_dtype)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.einsum("bgrts->btgr", weights)
    context = mixed_precision_einsum("bgrts,bsgk->btgrk", weights, v, compute_dtype)
    return checkpoint_name(context, "attention over values") / total[..., None]
