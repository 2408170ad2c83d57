"""The decode loop: rows that draw sample after sample, one page of 32 tokens at a time.

BOS-only sampling makes this simple. Every sample starts at position 0 with the same token, so none waits for a prefill,
and all rows share one offset in the page. A page is a `lax.scan` over `models.decode_step`. At its end, on each replica
by itself, every row's page is flushed behind its settled cache and into its sample's line of the output, and rows whose
sample has ended take the next one of the replica's queue. A `lax.while_loop` runs pages; one program serves samples of
any length, and with a queue no longer than the rows (*lockstep*: nothing to refill with) as well as with a whole shard
queued up (*refill*).

A sample depends on its key and the parameters alone: not on the row it is drawn in, its neighbours, or when it started.
Rows meet only in how many blocks of the cache are read and how many pages are run, and neither changes a bit of a row
(see `models.cache`). What is drawn between a sample's end and the end of its page is never looked at.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jax_selftrain.hub import LoadedModel
from jax_selftrain.mesh import Layout, place
from jax_selftrain.models import (
    PAGE,
    Cache,
    DecoderConfig,
    Params,
    decode_step,
    filled_blocks,
    flush_page,
    init_cache,
    project,
)
from jax_selftrain.sampling.draw import draw, take, tree_widths, whole_rows
from jax_selftrain.sampling.policy import Policy, log_total, mask_logits
from jax_selftrain.sampling.words import token_words

BLOCK = {"cpu": 64}
"""Slots of a settled block: on a CPU small enough to stay in the cache of a core."""
ACCELERATOR_BLOCK = 256

REPORT_SECONDS = 1.0
"""About how often the host looks at the loop."""


@dataclass(frozen=True)
class Architecture:
    """What a compiled program depends on beside shapes and policy: a static argument."""

    config: DecoderConfig
    layout: Layout
    compute_dtype: str
    """Type of matmul operands."""
    cache_dtype: str | None = None
    """Type of settled keys and values: a float type or int8; None: that of matmul operands."""

    @property
    def block(self) -> int:
        return BLOCK.get(self.layout.mesh.devices.flat[0].platform, ACCELERATOR_BLOCK)

    def init_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache with room for `capacity` settled tokens in each of `rows` rows (over all replicas)."""
        block = min(self.block, -(-capacity // PAGE) * PAGE)
        settled = self.cache_dtype or self.compute_dtype
        return init_cache(
            self.config, self.layout, rows, capacity, self.compute_dtype, settled_dtype=settled, block=block
        )


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


@dataclass(frozen=True)
class Drawn:
    """Samples on the host, in the order of their keys."""

    tokens: Int32[np.ndarray, "N T"]
    """0 after a sample's end."""
    lengths: Int32[np.ndarray, " N"]
    logprobs: Float32[np.ndarray, " N"]
    """Sum over a sample's tokens of their log-probability at temperature 1 over the whole, unmasked vocabulary."""
    policy_logprobs: Float32[np.ndarray, " N"]
    """The same under the policy, over what it leaves of the vocabulary."""
    stopped: Bool[np.ndarray, " N"]
    """Ended by a stop id; the others by length."""
    finite: Bool[np.ndarray, " N"]
    """False where the model's logits were NaN or +inf: the sample is meaningless."""
    slots: int
    """Tokens that the rows could have drawn in the time: rows × steps."""

    @property
    def utilisation(self) -> float:
        """Share of the rows' steps whose token is part of a sample."""
        return float(self.lengths.sum()) / max(self.slots, 1)


def architecture_of(model: LoadedModel, cache_dtype: str | None = None) -> Architecture:
    """The architecture of a loaded model, as it was loaded."""
    return Architecture(model.config, model.layout, np.dtype(model.compute_dtype).name, cache_dtype)


class DecodeLoop:
    """The loop for samples of one model and policy, with the memory it works in."""

    def __init__(
        self, architecture: Architecture, policy: Policy, params: Params, *, rows: int, queue: int | None = None
    ):
        """
        Args:
          params: on the mesh of `architecture.layout`.
          rows: of one replica's batch.
          queue: samples that one call of `draw` can draw on each replica; more than `rows` of them refill rows whose
            sample has ended. Default: `rows`, so that there is nothing to refill with (lockstep).
        """
        self.architecture, self.policy, self.params = architecture, policy, params
        self.rows, self.queue = rows, rows if queue is None else queue
        self._cache: Cache | None = None

    def draw(self, keys: UInt32[np.ndarray, "N 2"], *, report: Callable[[int], None] = lambda ended: None) -> Drawn:
        """Draw one sample per key.

        Args:
          keys: from `words.sample_keys`; 1 … queue × replicas of them. Replicas take equal shares, in order.
          report: told about once a second how many samples have ended so far; what it raises ends the call.
        """
        layout = self.architecture.layout
        share, more = divmod(len(keys), layout.data)
        counts = np.full(layout.data, share, np.int32) + (np.arange(layout.data) < more)
        if not 0 < len(keys) <= self.queue * layout.data:
            raise ValueError(f"{len(keys)} samples do not fit in {layout.data} queues of {self.queue}")
        queued = np.zeros((layout.data, self.queue, 2), np.uint32)
        for mine, part in zip(queued, np.split(keys, np.cumsum(counts)[:-1]), strict=True):
            mine[: len(part)] = part
        with jax.set_mesh(layout.mesh):
            queue = Queue(place(layout, queued.reshape(-1, 2), ("batch", None)), place(layout, counts, ("batch",)))
            state, pages = self._run(queue, report)
        samples = jax.device_get(state.samples)
        order = np.concatenate([r * (self.queue + 1) + np.arange(n) for r, n in enumerate(counts)])
        drawn = Drawn(
            tokens=np.ascontiguousarray(samples.tokens[order, : self.policy.max_tokens]),
            lengths=samples.length[order],
            logprobs=samples.logprobs[order].sum(axis=1, dtype=np.float64).astype(np.float32),
            policy_logprobs=samples.policy_logprobs[order].sum(axis=1, dtype=np.float64).astype(np.float32),
            stopped=samples.stopped[order],
            finite=samples.finite[order],
            slots=pages * PAGE * self.rows * layout.data,
        )
        if drawn.finite.all():  # NaN in a stale slot would spread: its weight is 0, but 0 · NaN is NaN
            self._cache = state.cache
        return drawn

    def _run(self, queue: Queue, report: Callable[[int], None]) -> tuple[DecodeState, int]:
        """Run pages until every sample has ended; the state, and how many pages that were."""
        given, rows, programs = (self.architecture, self.policy), self.rows * self.architecture.layout.data, _programs()
        cache, self._cache = self._cache, None
        if cache is None:
            cache = programs.empty_cache(*given, rows)
        state, pages = programs.begin(*given, rows, queue, cache), 1
        while True:
            began = time.perf_counter()
            state = programs.run(*given, self.params, queue, state, np.int32(pages))
            busy, ended, run = jax.device_get(programs.progress(state))
            report(int(ended))
            if not busy:
                return state, int(run)
            if time.perf_counter() - began < REPORT_SECONDS / 2:
                pages *= 2


def decode(
    architecture: Architecture,
    policy: Policy,
    params: Params,
    keys: UInt32[np.ndarray, "N 2"],
    *,
    rows: int,
    queue: int | None = None,
    report: Callable[[int], None] = lambda ended: None,
) -> Drawn:
    """`DecodeLoop.draw`, once; the queue takes all samples by default."""
    places = -(-len(keys) // architecture.layout.data) if queue is None else queue
    return DecodeLoop(architecture, policy, params, rows=rows, queue=places).draw(keys, report=report)


def empty_cache(architecture: Architecture, policy: Policy, rows: int) -> Cache:
    """A cache for samples of the policy's length, in `rows` rows over all replicas."""
    return architecture.init_cache(rows, _line(policy))


def initial_state(architecture: Architecture, policy: Policy, rows: int, queue: Queue, cache: Cache) -> DecodeState:
    """The state before the first token: every row has taken a sample, if there were enough.

    Args:
      cache: from `empty_cache`, or of a loop of the same shape that has ended (what it holds is finite and unseen).
    """
    layout = architecture.layout
    batch, line = layout.sharding(("batch",)), layout.sharding(("batch", None))
    places = len(queue.keys) + layout.data
    length = _line(policy)
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
    refilled, following = _on_each_replica(layout, _refill, policy)(idle, zeros((layout.data,), jnp.int32), queue)
    return DecodeState(cache, refilled, following, samples, jnp.zeros((), jnp.int32))


def decode_pages(
    architecture: Architecture,
    policy: Policy,
    params: Params,
    queue: Queue,
    state: DecodeState,
    pages: Int32[Array, ""],
) -> DecodeState:
    """Run up to so many pages, or until every sample has ended: the program that sampling spends its time in.

    Args:
      architecture, policy: static.
      state: its buffers are given up to the result's (donated).
    """
    layout, levels = architecture.layout, len(tree_widths(architecture.config.vocab_size))

    def advance(hidden: jax.Array, position: jax.Array, before: Rows) -> tuple[jax.Array, Rows, Any]:
        logits = logits_of(architecture, params, hidden)
        masked = mask_logits(logits, policy)
        token, masked_total = draw(masked, token_words(before.key, position, levels))
        total = log_total(logits, policy, masked_total)
        finite = jnp.isfinite(total)
        active = ~before.done
        stop = jnp.zeros_like(active)
        for stop_id in policy.stop_ids:
            stop = stop | (token == stop_id)
        length = before.length + active
        after = replace(
            before,
            length=length,
            done=before.done | stop | ~finite | (length >= policy.max_tokens),
            stopped=before.stopped | (active & stop),
            finite=before.finite & (finite | before.done),
        )
        drawn = (token, take(logits, token) - total, take(masked, token) - masked_total)
        return token, after, tuple(jnp.where(active, x, 0) for x in drawn)

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.pages < last) & ~jnp.all(state.rows.done)

    def page(state: DecodeState) -> DecodeState:
        cache, token, rows, drawn = decode_page(
            architecture, params, state.cache, state.rows.settled, state.rows.token, state.rows, advance
        )
        rows, following, samples = _on_each_replica(layout, _turn, policy)(
            replace(rows, token=token), state.following, queue, state.samples, drawn
        )
        return DecodeState(cache, rows, following, samples, state.pages + 1)

    last = state.pages + pages
    return jax.lax.while_loop(unfinished, page, state)


def decode_page(
    architecture: Architecture,
    params: Params,
    cache: Cache,
    settled: jax.Array,
    token: jax.Array,
    carry: Any,
    advance: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any, Any]],
) -> tuple[Cache, jax.Array, Any, Any]:
    """Decode PAGE steps behind the `settled` tokens [B] of each row, and flush them.

    Args:
      token: [B], fed first.
      advance: (hidden [B, D], position [B], carry) → (next token [B], carry, out).

    Returns:
      The cache with one more settled page, the next token, the carry, and the PAGE outs stacked.
    """
    blocks = filled_blocks(cache, settled)

    def step(state: tuple, offset: jax.Array) -> tuple[tuple, Any]:
        (page_k, page_v), token, carry = state
        position = settled + offset
        hidden, stepped = decode_step(
            architecture.config,
            architecture.layout,
            params,
            cache.with_page(page_k, page_v),
            token,
            position,
            settled,
            blocks,
            offset,
            compute_dtype=architecture.compute_dtype,
        )
        token, carry, out = advance(hidden, position, carry)
        return ((stepped.page_k, stepped.page_v), token, carry), out

    begin = ((cache.page_k, cache.page_v), token, carry)
    (page, token, carry), outs = jax.lax.scan(step, begin, jnp.arange(PAGE, dtype=jnp.int32))
    return flush_page(architecture.layout, cache.with_page(*page), settled), token, carry, outs


def logits_of(architecture: Architecture, params: Params, hidden: jax.Array) -> jax.Array:
    """Logits [B, V] in fp32, the vocabulary whole on every device of a replica."""
    config, layout, dtype = architecture.config, architecture.layout, architecture.compute_dtype
    return whole_rows(project(config, layout, params, hidden, compute_dtype=dtype))


# ---------------------------------------------------------------- between two pages, on one replica


def _turn(
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


def _on_each_replica(layout: Layout, function: Callable, policy: Policy) -> Callable:
    """`function(policy, rows, …)` on each replica's own part of arrays whose first axis is the batch.

    (`drawn`, the last argument of `_turn`, has the batch second.)
    """
    first, second = layout.spec(("batch",)), layout.spec((None, "batch"))
    specs = (first, first, first, first, second)

    def apply(*arguments: Any) -> Any:
        mapped = jax.shard_map(partial(function, policy), in_specs=specs[: len(arguments)], out_specs=first)
        return mapped(*arguments)

    return apply


def _progress_of(state: DecodeState) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How many rows are busy, how many samples have ended, and how many pages were run."""
    busy = jnp.sum(~state.rows.done)
    return busy, jnp.sum(state.following) - busy, state.pages


def _line(policy: Policy) -> int:
    """T: the length limit in whole pages."""
    return -(-policy.max_tokens // PAGE) * PAGE


@dataclass(frozen=True)
class _Programs:
    """The functions above, compiled."""

    empty_cache: Callable[..., Cache]
    begin: Callable[..., DecodeState]
    run: Callable[..., DecodeState]
    progress: Callable[[DecodeState], tuple[jax.Array, jax.Array, jax.Array]]


@cache
def _programs() -> _Programs:
    return _Programs(
        empty_cache=jax.jit(empty_cache, static_argnums=(0, 1, 2)),
        begin=jax.jit(initial_state, static_argnums=(0, 1, 2), donate_argnums=(4,)),
        run=jax.jit(decode_pages, static_argnums=(0, 1), donate_argnums=(4,), compiler_options=compiler_options()),
        progress=jax.jit(_progress_of),
    )


def compiler_options() -> dict[str, bool]:
    """For `jax.jit` of the loop on this process's default devices.

    On a CPU, XLA may run independent operations of a step at once. They are few and small beside the products, which
    use all cores anyway: one after the other took a seventh less time (2 cores, the shape of Pythia-70m).
    """
    return {"xla_cpu_enable_concurrency_optimized_scheduler": False} if jax.default_backend() == "cpu" else {}
