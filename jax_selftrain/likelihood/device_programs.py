"""What runs on the devices when likelihoods are scored: what a unit's tokens are by themselves is learned, rows fill a
pool of hidden states, and a pool meets the vocabulary.

Pure functions, compiled by `scoring.likelihood` for each length of rows that `scoring.units` plans. Dimensions beside
the usual ones: S devices along `data`, N places of the pool and W different tokens on each, Q positions of a row that
its last layer computes, M tokens asked for at a place.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.likelihood.batching import PROJECTION_CHUNK
from jax_selftrain.models import DecoderConfig, Params, Precomputed, forward, precompute, unembed


def precompute_tokens(
    config: DecoderConfig,
    rules: ShardingRules,
    compute_dtype: DTypeLike,
    params: Params,
    known: Precomputed,
    unique_tokens: Int[Array, "S W"],
    chunks: Int[Array, ""],
) -> Precomputed:
    """What the different tokens of a unit are by themselves, `CHUNK` of them at a time (`models.learned`)."""
    return precompute(
        config, rules, params, known, unique_tokens, chunks, PROJECTION_CHUNK, compute_dtype=compute_dtype
    )


def encode_batch(
    config: DecoderConfig,
    rules: ShardingRules,
    compute_dtype: DTypeLike,
    params: Params,
    hidden_buffer: Float[Array, "S N D"],
    known: Precomputed,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    ends: Int[Array, "B T"],
    at: Int[Array, "B Q"],
    query_index: Int[Array, "S N"],
) -> Float[Array, "S N D"]:
    """Compute one padded batch; S devices along `data` hold B/S rows each.

    Args:
      config, rules, compute_dtype: static.
      params: the model.
      pool: hidden states so far, N places on each device.
      known: from `learn_tokens`.
      tokens: rows, padded on the right, of places in `known`.
      positions, ends: see `models.forward`.
      at: the positions of each row that the last layer computes.
      slots: for each place of the pool, which of those B/S·Q positions of the same device goes there; −1: none.

    Returns:
      The pool with the hidden states of this batch.
    """
    hidden = forward(
        config,
        rules,
        params,
        tokens,
        positions=positions,
        subtree_ends=ends,
        query_positions=at,
        precomputed=known,
        compute_dtype=compute_dtype,
    )
    hidden = jnp.reshape(hidden, (rules.data_parallelism, -1, hidden.shape[-1]), out_sharding=buffer_sharding(rules))
    data = PartitionSpec("data")

    # A gather across all rows would move hidden states between devices; each device needs only its own.
    @partial(jax.shard_map, in_specs=(data, data, data), out_specs=data)
    def put(rows: Array, at: Array, before: Array) -> Array:
        taken = jnp.take_along_axis(rows, jnp.maximum(at, 0)[..., None], axis=1)
        return jnp.where((at >= 0)[..., None], taken.astype(before.dtype), before)

    return put(hidden, query_index, hidden_buffer)


def score_buffer(
    config: DecoderConfig,
    rules: ShardingRules,
    compute_dtype: DTypeLike,
    params: Params,
    pool: Float[Array, "S N D"],
    targets: Int[Array, "S N M"],
    chunks: Int[Array, ""],
) -> tuple[Float[Array, "S N M"], Int[Array, "S N"]]:
    """Project a pool to the vocabulary.

    Args:
      config, rules, compute_dtype: static.
      params: the model.
      pool: from `fill_pool`.
      targets: tokens asked for at each place.
      chunks: how many chunks of `CHUNK` places are in use on the fullest device.

    Returns:
      Log-probability of each target (nats, fp32) and the most probable token at each place, whole on every device.
    """
    replicated = PartitionSpec()

    def score_chunk(i: Array, done: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, wanted = (
            jax.lax.dynamic_slice_in_dim(array, i * PROJECTION_CHUNK, PROJECTION_CHUNK, axis=1)
            for array in (pool, targets)
        )
        new = logprobs_and_argmax(rules, unembed(config, rules, params, hidden, compute_dtype=compute_dtype), wanted)
        logprobs, greedy = (
            jax.lax.dynamic_update_slice_in_dim(old, part, i * PROJECTION_CHUNK, axis=1)
            for old, part in zip(done, new, strict=True)
        )
        return logprobs, greedy

    nothing = (jnp.zeros_like(targets, jnp.float32), jnp.zeros_like(targets[..., 0]))
    logprobs, greedy = jax.lax.fori_loop(0, chunks, score_chunk, nothing)
    return jax.reshard(logprobs, replicated), jax.reshard(greedy, replicated)


def logprobs_and_argmax(
    rules: ShardingRules, logits: Float[Array, "S C V"], targets: Int[Array, "S C M"]
) -> tuple[Float[Array, "S C M"], Int[Array, "S C"]]:
    """Log-softmax at the targets, and the argmax (the lowest id among equals).

    Each device works on the logits that it holds; of a vocabulary that lies on several, they exchange only what they
    found. (Written as masked sums over V this took three times as long on a CPU.)
    """
    vocab = rules.spec(("vocab",))[0]
    data = PartitionSpec("data")

    @partial(jax.shard_map, in_specs=(PartitionSpec("data", None, vocab), data), out_specs=(data, data))
    def measure(logits: Array, targets: Array) -> tuple[Array, Array]:
        size = logits.shape[-1]
        offset = jax.lax.axis_index(vocab) * size if vocab else 0
        over_devices = (lambda reduce, x: reduce(x, vocab)) if vocab else (lambda reduce, x: x)
        own_best = jnp.max(logits, axis=-1)
        best = over_devices(jax.lax.pmax, own_best)
        total = over_devices(jax.lax.psum, jnp.sum(jnp.exp(logits - best[..., None]), axis=-1))
        here = targets - offset
        found = jnp.take_along_axis(logits, jnp.clip(here, 0, size - 1), axis=-1)
        found = over_devices(jax.lax.psum, jnp.where((here >= 0) & (here < size), found, 0.0))
        top = jnp.argmax(logits, axis=-1).astype(jnp.int32) + offset
        top = over_devices(jax.lax.pmin, jnp.where(own_best == best, top, np.iinfo(np.int32).max))
        return found - best[..., None] - jnp.log(total)[..., None], top

    return measure(logits, targets)


def score_batch(
    config: DecoderConfig,
    rules: ShardingRules,
    compute_dtype: DTypeLike,
    params: Params,
    pool: Float[Array, "S N D"],
    known: Precomputed,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    ends: Int[Array, "B T"],
    at: Int[Array, "B Q"],
    slots: Int[Array, "S N"],
    vocabulary: Int[Array, "S W"],
    targets: Int[Array, "S N M"],
    chunks: Int[Array, ""],
) -> tuple[Float[Array, "S N M"], Int[Array, "S N"]]:
    """`learn_tokens`, `fill_pool`, `score_pool`: a unit of one batch in one program, as many chunks of one as of the
    other."""
    known = precompute_tokens(config, rules, compute_dtype, params, known, vocabulary, chunks)
    pool = encode_batch(config, rules, compute_dtype, params, pool, known, tokens, positions, ends, at, slots)
    return score_buffer(config, rules, compute_dtype, params, pool, targets, chunks)


def buffer_sharding(rules: ShardingRules) -> jax.sharding.NamedSharding:
    """Of hidden states [S, N, D]."""
    return rules.sharding(("batch", None, None))
