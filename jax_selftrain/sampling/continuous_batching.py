"""Which sample each row is busy with: the queue, the rows, what has been drawn, and the turn between two pages.

All of it happens on each replica by itself. Arrays have the batch, or the queue, of all replicas along their first
axis, sharded on `data`; inside `on_each_replica` a function sees its own part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.models import TAIL_LEN, KVCache
from jax_selftrain.sampling.sampling_params import SamplingParams


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "count"], meta_fields=[])
@dataclass(frozen=True)
class RequestQueue:
    """The samples to draw: each replica has Q places, of which the first `count` hold one."""

    keys: UInt32[Array, "R*Q 2"]
    """From `words.sample_keys`."""
    count: Int32[Array, " R"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["queue_index", "key", "token", "cache_len", "length", "done", "stopped", "finite"],
    meta_fields=[],
)
@dataclass(frozen=True)
class DecodeSlots:
    """What each row of the batch is busy with."""

    queue_index: Int32[Array, " B"]
    """Its sample's place in the replica's queue; Q: none."""
    key: UInt32[Array, "B 2"]
    token: Int32[Array, " B"]
    """Fed next."""
    cache_len: Int32[Array, " B"]
    """Tokens fed before this page."""
    length: Int32[Array, " B"]
    """Tokens drawn, the stop id included."""
    done: Bool[Array, " B"]
    """The sample has ended (or there is none)."""
    stopped: Bool[Array, " B"]
    """It ended by a stop id."""
    finite: Bool[Array, " B"]
    """False where logits gave no distribution (NaN or +inf)."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "logprobs", "policy_logprobs", "length", "stopped", "finite"],
    meta_fields=[],
)
@dataclass(frozen=True)
class SampleBuffer:
    """What has been drawn, by place in the queue. Each replica has one place more, for rows without a sample."""

    tokens: Int32[Array, "R*(Q+1) T"]
    """0 after a sample's end; T is the length limit rounded up to whole pages."""
    logprobs: Float32[Array, "R*(Q+1) T"]
    """Log-probability of each token at temperature 1 over the whole vocabulary, 0 after a sample's end."""
    policy_logprobs: Float32[Array, "R*(Q+1) T"]
    """Log-probability of each token under the policy."""
    length: Int32[Array, " R*(Q+1)"]
    stopped: Bool[Array, " R*(Q+1)"]
    finite: Bool[Array, " R*(Q+1)"]


@partial(
    jax.tree_util.register_dataclass, data_fields=["cache", "rows", "next_index", "samples", "pages"], meta_fields=[]
)
@dataclass(frozen=True)
class DecodeState:
    """Everything between two pages."""

    cache: KVCache
    rows: DecodeSlots
    next_index: Int32[Array, " R"]
    """The next place of each replica's queue."""
    samples: SampleBuffer
    pages: Int32[Array, ""]
    """Pages run so far."""


def padded_output_len(sampling_params: SamplingParams) -> int:
    """T: the length limit in whole pages."""
    return -(-sampling_params.max_tokens // TAIL_LEN) * TAIL_LEN


def initial_state(
    rules: ShardingRules, sampling_params: SamplingParams, rows: int, queue: RequestQueue, cache: KVCache
) -> DecodeState:
    """The state before the first token: every row has taken a sample, if there were enough.

    Args:
      cache: empty, or of a loop of the same shape that has ended (what it holds is finite and unseen).
    """
    batch, line = rules.sharding(("batch",)), rules.sharding(("batch", None))
    places = len(queue.keys) + rules.data_parallelism
    length = padded_output_len(sampling_params)
    zeros = partial(jnp.zeros, out_sharding=batch)
    idle = DecodeSlots(
        queue_index=jnp.full((rows,), len(queue.keys) // rules.data_parallelism, jnp.int32, out_sharding=batch),
        key=jnp.zeros((rows, 2), jnp.uint32, out_sharding=line),
        token=zeros((rows,), jnp.int32),
        cache_len=zeros((rows,), jnp.int32),
        length=zeros((rows,), jnp.int32),
        done=jnp.ones((rows,), bool, out_sharding=batch),
        stopped=zeros((rows,), bool),
        finite=jnp.ones((rows,), bool, out_sharding=batch),
    )
    samples = SampleBuffer(
        tokens=jnp.zeros((places, length), jnp.int32, out_sharding=line),
        logprobs=jnp.zeros((places, length), jnp.float32, out_sharding=line),
        policy_logprobs=jnp.zeros((places, length), jnp.float32, out_sharding=line),
        length=zeros((places,), jnp.int32),
        stopped=zeros((places,), bool),
        finite=jnp.ones((places,), bool, out_sharding=batch),
    )
    refilled, following = per_replica(rules, _refill, sampling_params)(
        idle, zeros((rules.data_parallelism,), jnp.int32), queue
    )
    return DecodeState(cache, refilled, following, samples, jnp.zeros((), jnp.int32))


def refill_slots(
    sampling_params: SamplingParams,
    rows: DecodeSlots,
    following: jax.Array,
    queue: RequestQueue,
    samples: SampleBuffer,
    chunk_outputs: tuple[jax.Array, ...],
) -> tuple[DecodeSlots, jax.Array, SampleBuffer]:
    """Put down what the page gave, and let rows whose sample has ended take the next."""

    def line(b: jax.Array, into: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        at = rows.queue_index[b], rows.cache_len[b]
        return tuple(
            jax.lax.dynamic_update_slice(old, jax.lax.dynamic_slice_in_dim(new, b, 1, axis=1).T, at)
            for old, new in zip(into, chunk_outputs, strict=True)
        )

    lines = (samples.tokens, samples.logprobs, samples.policy_logprobs)
    tokens, logprobs, policy_logprobs = jax.lax.fori_loop(0, len(rows.queue_index), line, lines)
    samples = SampleBuffer(
        tokens=tokens,
        logprobs=logprobs,
        policy_logprobs=policy_logprobs,
        length=samples.length.at[rows.queue_index].set(rows.length),
        stopped=samples.stopped.at[rows.queue_index].set(rows.stopped),
        finite=samples.finite.at[rows.queue_index].set(rows.finite),
    )
    rows, following = _refill(sampling_params, replace(rows, cache_len=rows.cache_len + TAIL_LEN), following, queue)
    return rows, following, samples


def _refill(
    sampling_params: SamplingParams, rows: DecodeSlots, following: jax.Array, queue: RequestQueue
) -> tuple[DecodeSlots, jax.Array]:
    """Rows that are done take the next samples in the order of rows; those for which none is left stay idle."""
    idle = jnp.int32(len(queue.keys))
    candidate = following + jnp.cumsum(rows.done, dtype=jnp.int32) - 1
    taken = rows.done & (candidate < queue.count)
    there = jnp.where(rows.done, jnp.where(taken, candidate, idle), rows.queue_index)

    def fresh(value: jax.typing.ArrayLike, old: jax.Array) -> jax.Array:
        return jnp.where(rows.done, value, old)

    refilled = DecodeSlots(
        queue_index=there,
        key=queue.keys.at[there].get(mode="clip"),
        token=fresh(sampling_params.start_id, rows.token),
        cache_len=fresh(0, rows.cache_len),
        length=fresh(0, rows.length),
        done=rows.done & ~taken,
        stopped=rows.stopped & ~rows.done,
        finite=rows.finite | rows.done,
    )
    return refilled, following + jnp.sum(taken, dtype=jnp.int32)


def per_replica(rules: ShardingRules, function: Callable, sampling_params: SamplingParams) -> Callable:
    """`function(sampling_params, rows, …)` on each replica's own part of arrays whose first axis is the batch.

    (`drawn`, the last argument of `turn`, has the batch second.)
    """
    first, second = rules.spec(("batch",)), rules.spec((None, "batch"))
    specs = (first, first, first, first, second)

    def apply(*arguments: Any) -> Any:
        mapped = jax.shard_map(partial(function, sampling_params), in_specs=specs[: len(arguments)], out_specs=first)
        return mapped(*arguments)

    return apply


def progress_of(state: DecodeState) -> tuple[jax.Array, ...]:
    """How many rows are busy, samples have ended, tokens they all have, and pages were run."""
    busy = jnp.sum(~state.rows.done)
    return busy, jnp.sum(state.next_index) - busy, jnp.sum(state.samples.length), state.pages
