"""Attention over whole rows: a plain form, and a fused TPU kernel.

The plain form runs everywhere and is the reference. bfloat16 training on a TPU uses JAX's splash attention
(`jax.experimental.pallas.ops.tpu.splash_attention`), a flash kernel (arXiv:2205.14135) with causal masks, documents and
grouped queries: scores stay in the chip's fast memory, and fully masked tiles are skipped. Like the plain form it
multiplies in bfloat16 with an fp32 softmax. It would round fp32 operands to bfloat16, so that fp32 uses the plain form.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jax_selftrain.distributed.mesh import mesh_platform
from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.models.config import DecoderConfig
from jax_selftrain.models.matmul import mixed_precision_einsum

BLOCK_SIZES = (512, 256, 128)
"""Tile sizes of the kernel, in tokens; the largest that divides the row is used."""


def can_use_splash(config: DecoderConfig, rules: ShardingRules, length: int, compute_dtype: DTypeLike) -> bool:
    """Return True if the TPU kernel supports these inputs."""
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
    compute_dtype: DTypeLike,
    *,
    interpret: bool = False,
) -> Float[Array, "B T G R K"]:
    """Compute causal attention within documents by the TPU kernel.

    Args:
      segments: document number of each token; None: one document per row.
      interpret: run the kernel step by step on any device, for tests.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length = q.shape[1]
    size = next(size for size in BLOCK_SIZES if length % size == 0)
    block_sizes = splash.BlockSizes(size, size, size, size, size, size, size, size)  # forward and backward
    query_axes, key_axes = ("batch", None, "kv_heads", "q_per_kv", None), ("batch", None, "kv_heads", None)
    specs = rules.spec(query_axes), rules.spec(key_axes), rules.spec(key_axes), rules.spec(("batch", None))

    # The kernel does not declare the mesh axes over which its outputs vary.
    @partial(jax.shard_map, in_specs=specs, out_specs=specs[0], check_vma=False)
    def attend(q: Array, k: Array, v: Array, segments: Array) -> Array:
        heads = q.shape[2] * q.shape[3]
        mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
        kernel = splash.make_splash_mha_single_device(mask, block_sizes=block_sizes, interpret=interpret)
        operands = jnp.moveaxis(q.reshape(*q.shape[:2], heads, -1), 1, 2), jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
        context = jax.vmap(kernel)(*operands, splash.SegmentIds(segments, segments))
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
    compute_dtype: DTypeLike,
) -> Float[Array, "B T G R K"]:
    """Compute softmax(q kᵀ / √K) v over visible positions: the reference.

    The context, not the weights, is divided by their sum, so that the backward pass has no further sum over [T, S]; it
    recomputes the weights and keeps no array of that shape.
    """
    scores = mixed_precision_einsum("btgrk,bsgk->bgrts", q * q.shape[-1] ** -0.5, k, compute_dtype)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    denom = jnp.einsum("bgrts->btgr", weights)
    context = mixed_precision_einsum("bgrts,bsgk->btgrk", weights, v, compute_dtype)
    return checkpoint_name(context, "attention over values") / denom[..., None]
