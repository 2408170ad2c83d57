"""Device programs of the likelihood engine.

A unit of work runs three: precompute the activations of its unique tokens (`models.precompute`), encode each batch into
the buffer of hidden states, project the buffer to the vocabulary. Pure functions; `likelihood.engine` compiles them.

Dimensions: X devices along `data`, N buffer size, W unique tokens, Q query positions of a row, M targets.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.likelihood.batching import PROJECTION_CHUNK
from jax_selftrain.models import DecoderConfig, Params, forward, unembed
from jax_selftrain.models.layers import PreAttention


def encode_batch(
    config: DecoderConfig,
    rules: ShardingRules,
    compute_dtype: DTypeLike,
    params: Params,
    buffer: Float[Array, "X N D"],
    precomputed: PreAttention,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    subtree_ends: Int[Array, "B T"],
    query_positions: Int[Array, "B Q"],
    query_index: Int[Array, "X N"],
) -> Float[Array, "X N D"]:
    """Encode one padded batch and store its hidden states in the buffer.

    Args:
      config, rules, compute_dtype: static.
      params: of the model.
      buffer: hidden states of earlier batches.
      precomputed: activations of the unique tokens.
      tokens: rows, padded on the right; indices into the unique tokens of the row's device.
      positions, subtree_ends: see `models.forward`.
      query_positions: positions of each row that the last layer computes.
      query_index: for each buffer slot, the index of one of the B/X·Q queries of its device, or −1 to keep the slot.

    Returns:
      The buffer with the hidden states of this batch.
    """
    hidden = forward(
        config,
        rules,
        params,
        tokens,
        positions=positions,
        subtree_ends=subtree_ends,
        query_positions=query_positions,
        precomputed=precomputed,
        compute_dtype=compute_dtype,
    )
    sharding = rules.sharding(("batch", None, None))
    hidden = jnp.reshape(hidden, (rules.data_parallelism, -1, hidden.shape[-1]), out_sharding=sharding)
    data = PartitionSpec("data")

    # A gather across all rows would move hidden states between devices; each device needs only its own.
    @partial(jax.shard_map, in_specs=(data, data, data), out_specs=data)
    def update(rows: Array, index: Array, before: Array) -> Array:
        selected = jnp.take_along_axis(rows, jnp.maximum(index, 0)[..., None], axis=1)
        return jnp.where((index >= 0)[..., None], selected.astype(before.dtype), before)

    return update(hidden, query_index, buffer)


def score_buffer(
    config: DecoderConfig,
    rules: ShardingRules,
    compute_dtype: DTypeLike,
    params: Params,
    buffer: Float[Array, "X N D"],
    targets: Int[Array, "X N M"],
    num_chunks: Int[Array, ""],
    moments: bool = False,
) -> tuple[Array, ...]:
    """Project the buffer to the vocabulary, and score the targets.

    Args:
      config, rules, compute_dtype, moments: static.
      params: of the model.
      buffer: from `encode_batch`.
      targets: tokens to score at each slot.
      num_chunks: chunks of `PROJECTION_CHUNK` slots that the fullest device uses.

    Returns:
      Log-probability of each target ([X, N, M], nats, fp32) and the most probable token of each slot ([X, N]); with
      `moments` also the two arrays [X, N] of `logprob_moments`. Replicated.
    """
    replicated = PartitionSpec()

    def score_chunk(i: Array, scores: tuple[Array, ...]) -> tuple[Array, ...]:
        hidden, wanted = (
            jax.lax.dynamic_slice_in_dim(array, i * PROJECTION_CHUNK, PROJECTION_CHUNK, axis=1)
            for array in (buffer, targets)
        )
        logits = unembed(config, rules, params, hidden, compute_dtype=compute_dtype)
        new = logprobs_and_argmax(logits, wanted)
        if moments:  # the barrier keeps the fusions, and so the bits, of the other results
            new += logprob_moments(jax.lax.optimization_barrier(logits))
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(old, part, i * PROJECTION_CHUNK, axis=1)
            for old, part in zip(scores, new, strict=True)
        )

    init: tuple[Array, ...] = (jnp.zeros_like(targets, jnp.float32), jnp.zeros_like(targets[..., 0]))
    if moments:
        init += (jnp.zeros_like(init[0][..., 0]),) * 2
    scores = jax.lax.fori_loop(0, num_chunks, score_chunk, init)
    return tuple(jax.reshard(array, replicated) for array in scores)


def logprobs_and_argmax(logits: Float[Array, "X N V"], targets: Int[Array, "X N M"]) -> tuple[Array, ...]:
    """Compute log-softmax at the targets, [X, N, M], and argmax, [X, N].

    The argmax is the lowest id of equal logits. A device reduces its shard of the logits; devices exchange only the
    reductions. (Masked sums over V took three times as long on a CPU.)
    """
    sharding, data = jax.typeof(logits).sharding.spec, PartitionSpec("data")
    vocab = sharding[2]

    @partial(jax.shard_map, in_specs=(sharding, data), out_specs=(data, data))
    def reduce_shard(logits: Array, targets: Array) -> tuple[Array, Array]:
        size = logits.shape[-1]
        offset = jax.lax.axis_index(vocab) * size if vocab else 0
        over_devices = (lambda reduce, x: reduce(x, vocab)) if vocab else (lambda reduce, x: x)
        local_max = jnp.max(logits, axis=-1)
        best = over_devices(jax.lax.pmax, local_max)
        total = over_devices(jax.lax.psum, jnp.sum(jnp.exp(logits - best[..., None]), axis=-1))
        local = targets - offset
        logit = jnp.take_along_axis(logits, jnp.clip(local, 0, size - 1), axis=-1)
        logit = over_devices(jax.lax.psum, jnp.where((local >= 0) & (local < size), logit, 0.0))
        top = jnp.argmax(logits, axis=-1).astype(jnp.int32) + offset
        top = over_devices(jax.lax.pmin, jnp.where(local_max == best, top, np.iinfo(np.int32).max))
        return logit - best[..., None] - jnp.log(total)[..., None], top

    return reduce_shard(logits, targets)


def logprob_moments(logits: Float[Array, "X N V"]) -> tuple[Array, ...]:
    """Compute mean and standard deviation of log p, [X, N].

    They are moments under the model itself: the mean is the negative entropy, nats. Min-K%++ (Zhang et al.,
    arXiv:2404.02936) normalizes log-probabilities by them. The variance is a sum of squared deviations, so it does not
    cancel where p is close to 1. Tokens of probability zero add nothing.
    """
    sharding, data = jax.typeof(logits).sharding.spec, PartitionSpec("data")
    vocab = sharding[2]

    @partial(jax.shard_map, in_specs=sharding, out_specs=(data, data))
    def reduce_shard(logits: Array) -> tuple[Array, Array]:
        over_devices = (lambda reduce, x: reduce(x, vocab)) if vocab else (lambda reduce, x: x)
        best = over_devices(jax.lax.pmax, jnp.max(logits, axis=-1))
        shifted = logits - best[..., None]
        weights = jnp.exp(shifted)

        def expect(values: Array) -> Array:
            terms = jnp.where(weights > 0, weights * values, 0.0)
            return over_devices(jax.lax.psum, jnp.sum(terms, axis=-1)) / total

        total = over_devices(jax.lax.psum, jnp.sum(weights, axis=-1))
        mean = expect(shifted)
        variance = expect(jnp.square(shifted - mean[..., None]))
        return mean - jnp.log(total), jnp.sqrt(variance)

    return reduce_shard(logits)
