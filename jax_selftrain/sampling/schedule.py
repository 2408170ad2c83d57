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

from jax_selftrain.mesh import Layout
from jax_selftrain.models import PAGE, Cache
from jax_selftrain.sampling.policy import Policy


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "count"], meta_fields=[])
@dataclass(frozen=True)
class Queue:
    """The samples to draw: each replica has Q places, of which the first `count` hold one."""

    keys: UInt32[Array, "R*Q 2"]
    """From `words.sample_keys`."""
    count: Int32[Array, " R"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["place", "key", "token", "settled", "length", "done", "stopped", "finite"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Rows:
    """What each row of the batch is busy with."""

    place: Int32[Array, " B"]
    """Its sample's place in the replica's queue; Q: none."""
    key: UInt32[Array, "B 2"]
    token: Int32[Array, " B"]
    """Fed next."""
    settled: Int32[Array, " B"]
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
class Samples:
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
    jax.tree_util.register_dataclass, data_fields=["cache", "rows", "following", "samples", "pages"], meta_fields=[]
)
@dataclass(frozen=True)
class DecodeState:
    """Everything between two pages."""

    cache: Cache
    rows: Rows
    following: Int32[Array, " R"]
    """The next place of each replica's queue."""
    samples: Samples
    pages: Int32[Array, ""]
    """Pages run so far."""


def line_length(policy: Policy) -> int:
    """T: the length limit in whole pages."""
    return -(-policy.max_tokens // PAGE) * PAGE


def initial_state(layout: Layout, policy: Policy, rows: int, queue: Queue, cache: Cache) -> DecodeState:
    """The state before the first token: every row has taken a sample, if there were enough.

    Args:
      cache: empty, or of a loop of the same shape that has ended (what it holds is finite and unseen).
    """
    batch, line = layout.sharding(("batch",)), layout.sharding(("batch", None))
    places = len(queue.keys) + layout.data
    length = line_length(policy)
    zeros = partial(jnp.zeros, out_sharding=batch)
    idle = Rows(
        place=jnp.full((rows,), len(queue.keys) // layout.data, jnp.int32, out_sharding=batch),
        key=jnp.zeros((rows, 2), jnp.uint32, out_sharding=line),
        token=zeros((rows,), jnp.int32),
        settled=zeros((rows,), jnp.int32),
        length=zeros((rows,), jnp.int32),
        done=jnp.ones((rows,), bool, out_sharding=batch),
        stopped=zeros((rows,), bool),
        finite=jnp.ones((rows,), bool, out_sharding=batch),
    )
    samples = Samples(
        tokens=jnp.zeros((places, length), jnp.int32, out_sharding=line),
        logprobs=jnp.zeros((places, length), jnp.float32, out_sharding=line),
        policy_logprobs=jnp.zeros((places, length), jnp.float32, out_sharding=line),
        length=zeros((places,), jnp.int32),
        stopped=zeros((places,), bool),
        finite=jnp.ones((places,), bool, out_sharding=batch),
    )
    refilled, following = on_each_replica(layout, _refill, policy)(idle, zeros((layout.data,), jnp.int32), queue)
    return DecodeState(cache, refilled, following, samples, jnp.zeros((), jnp.int32))


def turn(
    policy: Policy, rows: Rows, following: jax.Array, queue: Queue, samples: Samples, drawn: tuple[jax.Array, ...]
) -> tuple[Rows, jax.Array, Samples]:
    """Put down what the page gave, and let rows whose sample has ended take the next."""

    def line(b: jax.Array, into: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        at = rows.place[b], rows.settled[b]
        return tuple(
            jax.lax.dynamic_update_slice(old, jax.lax.dynamic_slice_in_dim(new, b, 1, axis=1).T, at)
            for old, new in zip(into, drawn, strict=True)
        )

    lines = (samples.tokens, samples.logprobs, samples.policy_logprobs)
    tokens, logprobs, policy_logprobs = jax.lax.fori_loop(0, len(rows.place), line, lines)
    samples = Samples(
        tokens=tokens,
        logprobs=logprobs,
        policy_logprobs=policy_logprobs,
        length=samples.length.at[rows.place].set(rows.length),
        stopped=samples.stopped.at[rows.place].set(rows.stopped),
        finite=samples.finite.at[rows.place].set(rows.finite),
    )
    rows, following = _refill(policy, replace(rows, settled=rows.settled + PAGE), following, queue)
    return rows, following, samples


def _refill(policy: Policy, rows: Rows, following: jax.Array, queue: Queue) -> tuple[Rows, jax.Array]:
    """Rows that are done take the next samples in the order of rows; those for which none is left stay idle."""
    idle = jnp.int32(len(queue.keys))
    candidate = following + jnp.cumsum(rows.done, dtype=jnp.int32) - 1
    taken = rows.done & (candidate < queue.count)
    there = jnp.where(rows.done, jnp.where(taken, candidate, idle), rows.place)

    def fresh(value: jax.typing.ArrayLike, old: jax.Array) -> jax.Array:
        return jnp.where(rows.done, value, old)

    refilled = Rows(
        place=there,
        key=queue.keys.at[there].get(mode="clip"),
        token=fresh(policy.start_id, rows.token),
        settled=fresh(0, rows.settled),
        length=fresh(0, rows.length),
        done=rows.done & ~taken,
        stopped=rows.stopped & ~rows.done,
        finite=rows.finite | rows.done,
    )
    return refilled, following + jnp.sum(taken, dtype=jnp.int32)


def on_each_replica(layout: Layout, function: Callable, policy: Policy) -> Callable:
    """`function(policy, rows, …)` on each replica's own part of arrays whose first axis is the batch.

    (`drawn`, the last argument of `turn`, has the batch second.)
    """
    first, second = layout.spec(("batch",)), layout.spec((None, "batch"))
    specs = (first, first, first, first, second)

    def apply(*arguments: Any) -> Any:
        mapped = jax.shard_map(partial(function, policy), in_specs=specs[: len(arguments)], out_specs=first)
        return mapped(*arguments)

    return apply


def progress_of(state: DecodeState) -> tuple[jax.Array, ...]:
    """How many rows are busy, samples have ended, tokens they all have, and pages were run."""
    busy = jnp.sum(~state.rows.done)
    return busy, jnp.sum(state.following) - busy, jnp.sum(state.samples.length), state.pages
