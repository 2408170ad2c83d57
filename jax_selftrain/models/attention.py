"""Attention over whole rows: a plain form, and a fused TPU kernel.

The plain form runs everywhere and is the reference. bfloat16 training on a TPU uses JAX's splash attention
(`jax.experimental.pallas.ops.tpu.splash_attention`), a flash kernel (arXiv:2205.14135) with causal masks, documents and
grouped queries: scores stay in the chip's fast memory, and fully masked tiles are skipped. Like the plain form it
multiplies in bfloat16 with an fp32 softmax. It would round fp32 operands to bfloat16, so that fp32 uses the plain form.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
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


def dot_product_attention(
    q: Float[Array, "B T G R K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    mask: Bool[Array, "#B T S"],
    compute_dtype: DTypeLike,
) -> Float[Array, "B T G R K"]:
    """Compute softmax(q kᵀ / √K) v over visible positions: the reference.

    The backward pass recomputes the weights from their log-normalizer, as in flash attention (arXiv:2205.14135). Every
    product reads and writes the [T, S] arrays as stored: on a CPU, XLA transposes them slowly.
    """
    queries = jnp.moveaxis(q * q.shape[-1] ** -0.5, 1, 3)
    context = _attend(compute_dtype, queries, jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2), mask)
    return jnp.moveaxis(context, 3, 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    compute_dtype: DTypeLike,
    q: Float[Array, "B G R T K"],
    k: Float[Array, "B G S K"],
    v: Float[Array, "B G S K"],
    mask: Bool[Array, "#B T S"],
) -> Float[Array, "B G R T K"]:
    return _attend_fwd(compute_dtype, q, k, v, mask)[0]


def _masked_scores(compute_dtype: DTypeLike, q: Array, k: Array, mask: Array) -> Float[Array, "B G R T S"]:
    scores = mixed_precision_einsum("bgrtk,bgsk->bgrts", q, k, compute_dtype)
    return jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)


def _attend_fwd(compute_dtype: DTypeLike, q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, tuple[Array, ...]]:
    scores = _masked_scores(compute_dtype, q, k, mask)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    denom = jnp.sum(weights, axis=-1, keepdims=True)
    context = mixed_precision_einsum("bgrts,bgsk->bgrtk", weights, v, compute_dtype) / denom
    return context, (q, k, v, mask, context, largest + jnp.log(denom))


def _attend_bwd(
    compute_dtype: DTypeLike, residuals: tuple[Array, ...], grad: Array
) -> tuple[Array, Array, Array, None]:
    q, k, v, mask, context, log_denom = residuals
    weights = jnp.exp(_masked_scores(compute_dtype, q, k, mask) - log_denom)
    d_weights = mixed_precision_einsum("bgrtk,bgsk->bgrts", grad, v, compute_dtype)
    d_scores = weights * (d_weights - jnp.sum(grad * context, axis=-1, keepdims=True))
    d_q = mixed_precision_einsum("bgrts,bgsk->bgrtk", d_scores, k, compute_dtype)

    def sum_over_queries(x: Array, y: Array) -> Array:
        sharding = jax.typeof(k).sharding
        out = sharding.update(spec=PartitionSpec(*sharding.spec[:2], None, None))
        summed = mixed_precision_einsum("bgrtk,bgrts->bgks", x, y, compute_dtype, out)
        return jnp.swapaxes(jax.lax.optimization_barrier(summed), 2, 3)  # without it, XLA transposes y

    return d_q, sum_over_queries(q, d_scores), sum_over_queries(grad, weights), None


_attend.defvjp(_attend_fwd, _attend_bwd)
