"""Weighted next-token cross-entropy that never holds the logits of a whole batch.

At V = 50k the logits are the largest array of a training step by far: `[B, T, V]` in float32 is 13 GB for 32 rows of
2048 tokens. The projection to the vocabulary is therefore done for one slice of positions after another (`lax.scan`),
and `jax.checkpoint` makes the backward pass project again instead of keeping the logits. The price is one more
projection; memory stays under `LOGITS_BYTES` per device whatever the batch.

The sum of the weighted losses and the sum of the weights' magnitudes are returned apart: sums of micro-batches add up
exactly to those of the batch, means do not. Weights may be negative (the sign-flip arm of a study), hence |w|.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_selftrain.config import Remat
from jax_selftrain.mesh import Layout
from jax_selftrain.models import DecoderConfig, Params, forward, param_axes, project

LOGITS_BYTES = 2**28
"""Most bytes of float32 logits that one device holds at once."""


class Batch(NamedTuple):
    """Training rows on the mesh; a leading axis of micro-batches may stand before B."""

    tokens: Int[Array, "B T+1"]
    segments: Int[Array, "B T"]
    """Document of each input token, 1, 2, …; 0 is padding."""
    positions: Int[Array, "B T"]
    """Rotary position of each input token."""
    weights: Float[Array, "B T"]
    """Weight of predicting `tokens[:, t + 1]` from position t; 0: not a target."""


class LossSums(NamedTuple):
    """What a batch contributes to the loss; contributions of several batches may be added."""

    loss: Float[Array, ""]
    """Σ w · negative log-likelihood, in nats."""
    weight: Float[Array, ""]
    """Σ |w|."""
    tokens: Int[Array, ""]
    """Number of targets (w ≠ 0)."""


def chunk_length(config: DecoderConfig, layout: Layout, rows: int, length: int) -> int:
    """How many of `length` positions may be projected together when `rows` global rows are in flight."""
    vocab_sharded = dict(layout.rules)["vocab"] is not None
    vocab = config.vocab_size // (layout.model if vocab_sharded else 1)
    fits = max(1, LOGITS_BYTES // (4 * vocab * max(1, rows // layout.data)))
    chunks = -(-length // fits)
    return -(-length // chunks)


def loss_sums(
    config: DecoderConfig,
    layout: Layout,
    params: Params,
    batch: Batch,
    *,
    compute_dtype: DTypeLike = jnp.float32,
    remat: Remat = "none",
    chunk: int | None = None,
) -> LossSums:
    """Score a batch under teacher forcing.

    Args:
      config, layout, params: the model; params in float32.
      batch: rows of T positions.
      compute_dtype: type of the matmul operands; logits and softmax are float32 always (float64 for float64).
      remat: as in `models.forward`.
      chunk: positions projected together; unset: `chunk_length`.

    Returns:
      Sums over the batch: scalars.
    """
    tokens, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
    rows, length = tokens.shape
    chunk = chunk_length(config, layout, rows, length) if chunk is None else chunk
    hidden = forward(
        config,
        layout,
        params,
        tokens,
        positions=batch.positions,
        segments=batch.segments,
        compute_dtype=compute_dtype,
        remat=remat,
    )
    output = _gathered_output(config, layout, params)

    @jax.checkpoint
    def add_chunk(total: Float[Array, ""], piece: tuple[Array, Array, Array]) -> tuple[Float[Array, ""], None]:
        hidden, targets, weights = piece
        nll = token_nll(project(config, layout, output, hidden, compute_dtype=compute_dtype), targets)
        return total + jnp.sum(weights * nll), None

    pieces = tuple(_chunked(array, chunk) for array in (hidden, targets, batch.weights))
    loss, _ = jax.lax.scan(add_chunk, jnp.zeros((), hidden.dtype), pieces)
    return LossSums(
        loss=loss,
        weight=jnp.sum(jnp.abs(batch.weights)),
        tokens=jnp.sum(batch.weights != 0, dtype=jnp.int32),
    )


def token_nll(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """Negative log-likelihood of each target, in nats.

    The target's logit is picked by comparison, not by a gather: V may be sharded, and the comparison fuses.
    """
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)


def _chunked(array: Array, chunk: int) -> Array:
    """`[B, T, …]` → `[chunks, B, chunk, …]`, padded with zeros (a zero weight makes padding count for nothing)."""
    rows, length = array.shape[:2]
    chunks = -(-length // chunk)
    padding = [(0, 0), (0, chunks * chunk - length)] + [(0, 0)] * (array.ndim - 2)
    pieces = jnp.pad(array, padding).reshape(rows, chunks, chunk, *array.shape[2:])
    return jnp.moveaxis(pieces, 1, 0)


def _gathered_output(config: DecoderConfig, layout: Layout, params: Params) -> Params:
    """The parameters with the output matrix gathered along `embed`: once, not once per chunk of positions.

    It stays in float32, so that the gradients of the chunks add up in float32 whatever the compute type.
    """
    group, name = ("embed", "embedding") if config.tied else ("head", "kernel")
    axes = param_axes(config)[group][name]
    return {**params, group: {name: jax.reshard(params[group][name], layout.gathered(axes))}}
