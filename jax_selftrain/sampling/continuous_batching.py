"""Continuous batching: request queue, decode slots, sample buffer, refill.

Each replica works by itself. Arrays hold the slots, or the queues, of all replicas along their first axis, sharded on
`data`; inside `per_replica` a function sees the shard of its replica.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.models.kv_cache import TAIL_LEN, KVCache
from jax_selftrain.sampling.sampling_params import SamplingParams


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RequestQueue:
    """Samples to draw: the first `count` entries of each replica."""

    keys: UInt32[Array, "replicas*queue 2"]
    """From `per_sample_keys`."""
    count: Int32[Array, " replicas"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeSlots:
    """State of every slot of the decode batch."""

    queue_index: Int32[Array, " B"]
    """Queue entry of the slot's sample; the length of the queue: none."""
    key: UInt32[Array, "B 2"]
    token: Int32[Array, " B"]
    """Input of the next step."""
    committed_len: Int32[Array, " B"]
    """Tokens in committed blocks of the cache."""
    length: Int32[Array, " B"]
    """Tokens drawn, the stop id included; the start tokens do not count."""
    done: Bool[Array, " B"]
    """The sample has ended, or there is none."""
    stopped: Bool[Array, " B"]
    """A stop id ended the sample."""
    finite: Bool[Array, " B"]
    """False if logits were no distribution (NaN or +inf)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampleBuffer:
    """Drawn samples by queue entry, and one more entry for idle slots."""

    tokens: Int32[Array, "replicas*(queue+1) T"]
    """0 after the end of a sample and for the forced start tokens; T is `SamplingParams.output_len`."""
    logprobs: Float32[Array, "replicas*(queue+1) T"]
    """Log-probability of each token at temperature 1 over the whole vocabulary, 0 after the end of a sample."""
    policy_logprobs: Float32[Array, "replicas*(queue+1) T"]
    """Log-probability of each token under the warped logits."""
    length: Int32[Array, " replicas*(queue+1)"]
    stopped: Bool[Array, " replicas*(queue+1)"]
    finite: Bool[Array, " replicas*(queue+1)"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """State of the decode loop between two chunks."""

    cache: KVCache
    slots: DecodeSlots
    next_index: Int32[Array, " replicas"]
    """Next entry of each replica's queue."""
    samples: SampleBuffer
    num_chunks: Int32[Array, ""]
    """Chunks decoded so far."""


def initial_state(
    rules: ShardingRules, sampling_params: SamplingParams, num_slots: int, queue: RequestQueue, cache: KVCache
) -> DecodeState:
    """Create the state before the first token.

    Args:
      num_slots: B, of all replicas.
      cache: with the prefilled start tokens, or from a finished loop of the same shape and start tokens (its finite old
        contents are masked).
    """
    batch, rows = rules.sharding(("batch",)), rules.sharding(("batch", None))
    entries = len(queue.keys) + rules.data_parallelism
    length = sampling_params.output_len
    zeros = partial(jnp.zeros, out_sharding=batch)
    idle = DecodeSlots(
        queue_index=jnp.full((num_slots,), len(queue.keys) // rules.data_parallelism, jnp.int32, out_sharding=batch),
        key=jnp.zeros((num_slots, 2), jnp.uint32, out_sharding=rows),
        token=zeros((num_slots,), jnp.int32),
        committed_len=zeros((num_slots,), jnp.int32),
        length=zeros((num_slots,), jnp.int32),
        done=jnp.ones((num_slots,), bool, out_sharding=batch),
        stopped=zeros((num_slots,), bool),
        finite=jnp.ones((num_slots,), bool, out_sharding=batch),
    )
    samples = SampleBuffer(
        tokens=jnp.zeros((entries, length), jnp.int32, out_sharding=rows),
        logprobs=jnp.zeros((entries, length), jnp.float32, out_sharding=rows),
        policy_logprobs=jnp.zeros((entries, length), jnp.float32, out_sharding=rows),
        length=zeros((entries,), jnp.int32),
        stopped=zeros((entries,), bool),
        finite=jnp.ones((entries,), bool, out_sharding=batch),
    )
    slots, next_index = per_replica(rules, _assign_requests, sampling_params)(
        idle, zeros((rules.data_parallelism,), jnp.int32), queue
    )
    return DecodeState(cache, slots, next_index, samples, jnp.zeros((), jnp.int32))


def refill_slots(
    sampling_params: SamplingParams,
    slots: DecodeSlots,
    next_index: Array,
    queue: RequestQueue,
    samples: SampleBuffer,
    chunk_outputs: tuple[Array, ...],
) -> tuple[DecodeSlots, Array, SampleBuffer]:
    """Store the outputs of a chunk, then refill finished slots."""

    def store(b: Array, buffers: tuple[Array, ...]) -> tuple[Array, ...]:
        start = slots.queue_index[b], slots.committed_len[b] - sampling_params.prefilled_len
        return tuple(
            jax.lax.dynamic_update_slice(old, jax.lax.dynamic_slice_in_dim(new, b, 1, axis=1).T, start)
            for old, new in zip(buffers, chunk_outputs, strict=True)
        )

    buffers = (samples.tokens, samples.logprobs, samples.policy_logprobs)
    tokens, logprobs, policy_logprobs = jax.lax.fori_loop(0, len(slots.queue_index), store, buffers)
    samples = SampleBuffer(
        tokens=tokens,
        logprobs=logprobs,
        policy_logprobs=policy_logprobs,
        length=samples.length.at[slots.queue_index].set(slots.length),
        stopped=samples.stopped.at[slots.queue_index].set(slots.stopped),
        finite=samples.finite.at[slots.queue_index].set(slots.finite),
    )
    slots = replace(slots, committed_len=slots.committed_len + TAIL_LEN)
    slots, next_index = _assign_requests(sampling_params, slots, next_index, queue)
    return slots, next_index, samples


def _assign_requests(
    sampling_params: SamplingParams, slots: DecodeSlots, next_index: Array, queue: RequestQueue
) -> tuple[DecodeSlots, Array]:
    """Assign the next samples to free slots, in order."""
    idle = jnp.int32(len(queue.keys))
    candidate = next_index + jnp.cumsum(slots.done, dtype=jnp.int32) - 1
    is_assigned = slots.done & (candidate < queue.count)
    queue_index = jnp.where(slots.done, jnp.where(is_assigned, candidate, idle), slots.queue_index)

    def reset(value: jax.typing.ArrayLike, old: Array) -> Array:
        return jnp.where(slots.done, value, old)

    refilled = DecodeSlots(
        queue_index=queue_index,
        key=queue.keys.at[queue_index].get(mode="clip"),
        token=reset(sampling_params.start_ids[sampling_params.prefilled_len], slots.token),
        committed_len=reset(sampling_params.prefilled_len, slots.committed_len),
        length=reset(0, slots.length),
        done=slots.done & ~is_assigned,
        stopped=slots.stopped & ~slots.done,
        finite=slots.finite | slots.done,
    )
    return refilled, next_index + jnp.sum(is_assigned, dtype=jnp.int32)


def per_replica(rules: ShardingRules, function: Callable, sampling_params: SamplingParams) -> Callable:
    """Map `function(sampling_params, slots, …)` over replicas.

    Arrays are sharded along their first axis. The fifth argument (`chunk_outputs` of `refill_slots`) is sharded along
    its second axis.
    """
    first, second = rules.spec(("batch",)), rules.spec((None, "batch"))
    specs = (first, first, first, first, second)

    def apply(*arguments: Any) -> Any:
        mapped = jax.shard_map(partial(function, sampling_params), in_specs=specs[: len(arguments)], out_specs=first)
        return mapped(*arguments)

    return apply


def count_progress(state: DecodeState) -> tuple[Array, ...]:
    """Count busy slots, finished samples, drawn tokens and decoded chunks."""
    busy = jnp.sum(~state.slots.done)
    return busy, jnp.sum(state.next_index) - busy, jnp.sum(state.samples.length), state.num_chunks
