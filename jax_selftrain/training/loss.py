"""Weighted next-token cross-entropy, fused with the projection to the vocabulary.

The logits of a batch, float32 `[B, T, V]`, would be the largest array of a training step: 13 GB for 32 rows of 2048
tokens at V = 50k. They never exist as a whole. The loss projects one chunk of positions at a time and computes the
chunk's gradients in the same pass. The backward pass only scales these gradients, so each chunk is projected once.

Each replica accumulates the gradient of the output matrix over its own rows. Replicas reduce it once, at the end: under
automatic partitioning they would reduce this matrix for every chunk.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_selftrain.config import Remat
from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.models import DecoderConfig, Params, forward, unembed
from jax_selftrain.models.fsdp import (
    EMBEDDING_AXES,
    all_gather_param,
    is_fsdp_sharded,
    psum_scatter_grad,
    unshard_param,
)

LOGITS_BYTES = 2**26
"""Upper bound on the float32 logits of one chunk on one device, in bytes."""


class Batch(NamedTuple):
    """Training rows on the mesh; micro-batches may precede B."""

    tokens: Int[Array, "B T+1"]
    segments: Int[Array, "B T"]
    """Document of each input token, 1, 2, …; 0 is padding."""
    positions: Int[Array, "B T"]
    """Rotary position of each input token."""
    weights: Float[Array, "B T"]
    """Weight of the prediction of `tokens[:, t + 1]` at position t; 0: not a target; may be negative."""


class LossStats(NamedTuple):
    """Sums over the targets of a batch, additive over batches."""

    loss: Float[Array, ""]
    """Σ w · negative log-likelihood, in nats."""
    weight: Float[Array, ""]
    """Σ |w|."""
    tokens: Int[Array, ""]
    """Number of targets (w ≠ 0)."""

    @classmethod
    def zero(cls, dtype: DTypeLike = jnp.float32) -> "LossStats":
        """Return the sums of an empty batch."""
        return cls(jnp.zeros((), dtype), jnp.zeros((), dtype), jnp.zeros((), jnp.int32))


def choose_chunk_size(config: DecoderConfig, rules: ShardingRules, rows: int, length: int) -> int:
    """Return the positions to project at once for `rows` rows of `length`."""
    vocab_sharded = dict(rules.logical_to_mesh)["vocab"] is not None
    vocab = config.vocab_size // (rules.tensor_parallelism if vocab_sharded else 1)
    largest = max(1, LOGITS_BYTES // (4 * vocab * max(1, rows // rules.data_parallelism)))
    return -(-length // -(-length // largest))


def loss_fn(
    config: DecoderConfig,
    rules: ShardingRules,
    params: Params,
    batch: Batch,
    *,
    compute_dtype: DTypeLike = jnp.float32,
    remat: Remat = "none",
    chunk_size: int | None = None,
) -> tuple[Float[Array, ""], LossStats]:
    """Compute the teacher-forced loss of a batch.

    Args:
      compute_dtype: type of the matmul operands; logits and softmax are float32 (float64 for float64).
      remat: as in `models.forward`.
      chunk_size: positions projected at once; default: `choose_chunk_size`.

    Returns:
      The sum of w · negative log-likelihood in nats, which can be differentiated once with respect to `params`, and the
      sums for metrics and normalization.
    """
    tokens, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
    dtype = jnp.dtype(compute_dtype)
    head = _HeadSpec(config, rules, dtype, chunk_size or choose_chunk_size(config, rules, *tokens.shape))
    kernel = params[head.path[0]][head.path[1]]
    if not is_fsdp_sharded(rules, EMBEDDING_AXES):
        kernel = unshard_param(rules, kernel, EMBEDDING_AXES, kernel.dtype)  # gives its gradient the same sharding
    hidden = forward(
        config,
        rules,
        params,
        tokens,
        positions=batch.positions,
        segments=batch.segments,
        compute_dtype=dtype,
        remat=remat,
    )
    loss = _head_loss(head, kernel, hidden, targets, batch.weights)
    count = jnp.sum(batch.weights != 0, dtype=jnp.int32)
    return loss, LossStats(loss, jnp.sum(jnp.abs(batch.weights)), count)


class _HeadSpec(NamedTuple):
    """Static arguments of the loss on top of the hidden states."""

    config: DecoderConfig
    rules: ShardingRules
    compute_dtype: Any
    chunk_size: int

    @property
    def path(self) -> tuple[str, str]:
        """Path of the output matrix in the parameters."""
        return ("embed", "embedding") if self.config.tie_word_embeddings else ("head", "kernel")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_loss(
    head: _HeadSpec,
    kernel: Float[Array, "..."],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> Float[Array, ""]:
    """Compute the loss from hidden states and the (sharded) output matrix."""
    return _head_loss_forward(head, kernel, hidden, targets, weights)[0]


def _head_loss_forward(
    head: _HeadSpec, kernel: Array, hidden: Array, targets: Array, weights: Array
) -> tuple[Array, tuple[Array, Array]]:
    rows = PartitionSpec("data")

    # `model` remains an ordinary axis. The outputs have replicas or rows along their first dimension.
    @partial(jax.shard_map, in_specs=(PartitionSpec(), rows, rows, rows), out_specs=rows, axis_names={"data"})
    def local_loss(kernel: Array, hidden: Array, *rest: Array) -> tuple[Array, ...]:
        # The gradient of a kernel that varies over `data` is not reduced.
        kernel, zero = jax.lax.pcast((kernel, jnp.zeros((), hidden.dtype)), "data", to="varying")
        chunk_loss = partial(_chunk_loss, head, head.rules.without_data_axis())
        value_and_grad = jax.value_and_grad(chunk_loss, argnums=(0, 1))

        def add(carry: tuple[Array, Array], chunk: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
            loss, (d_kernel, d_hidden) = value_and_grad(kernel, *chunk)
            return (carry[0] + loss, carry[1] + d_kernel.astype(hidden.dtype)), d_hidden

        initial = (zero, jnp.zeros_like(kernel, hidden.dtype))
        (loss, d_kernel), d_hidden = jax.lax.scan(add, initial, _split(head.chunk_size, hidden, *rest))
        joined = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])
        return loss[None], d_kernel[None], joined[:, : hidden.shape[1]]

    gathered = all_gather_param(head.rules, kernel, EMBEDDING_AXES, head.compute_dtype)
    losses, d_kernels, d_hidden = local_loss(gathered, hidden, targets, weights)
    # XLA 0.10 cannot sum over one of several mesh axes inside `shard_map`: the sum over replicas is out here.
    loss = jnp.sum(losses)
    if is_fsdp_sharded(head.rules, EMBEDDING_AXES):
        specs = (PartitionSpec("data", *head.rules.unsharded_embed(EMBEDDING_AXES).spec),)
        d_kernel = psum_scatter_grad(head.rules, EMBEDDING_AXES, lambda own: own[0], specs, d_kernels)
    else:
        d_kernel = jnp.sum(d_kernels, axis=0)
    return loss, (d_kernel.astype(kernel.dtype), d_hidden)


def _head_loss_backward(
    head: _HeadSpec, grads: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array, None, None]:
    d_kernel, d_hidden = ((cotangent * grad).astype(grad.dtype) for grad in grads)
    return d_kernel, d_hidden, None, None


_head_loss.defvjp(_head_loss_forward, _head_loss_backward)


def _chunk_loss(
    head: _HeadSpec,
    rules: ShardingRules,
    kernel: Float[Array, "..."],
    hidden: Float[Array, "B C D"],
    targets: Int[Array, "B C"],
    weights: Float[Array, "B C"],
) -> Float[Array, ""]:
    """Compute the weighted loss of C positions of each row."""
    params = {head.path[0]: {head.path[1]: kernel}}
    logits = unembed(head.config, rules, params, hidden, compute_dtype=head.compute_dtype)
    # A comparison instead of a gather: V may be sharded, and the comparison fuses with the sum.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    return jnp.sum(weights * nll)


def _split(chunk_size: int, *arrays: Array) -> tuple[Array, ...]:
    """Split `[B, T, …]` into `[chunks, B, chunk_size, …]`.

    The last chunk is padded with zeros; weights of zero do not count.
    """

    def split(array: Array) -> Array:
        rows, length = array.shape[:2]
        chunks = -(-length // chunk_size)
        padding = [(0, 0), (0, chunks * chunk_size - length)] + [(0, 0)] * (array.ndim - 2)
        padded = jnp.pad(array, padding).reshape(rows, chunks, chunk_size, *array.shape[2:])
        return jnp.moveaxis(padded, 1, 0)

    return tuple(map(split, arrays))
