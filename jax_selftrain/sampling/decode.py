"""The decode loop: rows that draw sample after sample, one page of 32 tokens at a time.

BOS-only sampling makes this simple. Every sample starts at position 0 with the same token, so none waits for a prefill,
and all rows share one offset in the page. A page is a `lax.scan` over `models.decode_step`. At its end, on each replica
by itself, every row's page is flushed behind its settled cache and into its sample's line of the output, and rows whose
sample has ended take the next one of the replica's queue. A `lax.while_loop` runs pages; one program serves samples of
any length, and with a queue no longer than the rows (*lockstep*: nothing to refill with) as well as with a whole shard
queued up (*refill*).

A sample depends on its key and the parameters alone: not on the row it is drawn in, its neighbors, or when it started.
Rows meet only in how many blocks of the cache are read and how many pages are run, and neither changes a bit of a row
(see `models.cache`). What is drawn between a sample's end and the end of its page is never looked at.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jax_selftrain.distributed.mesh import mesh_context, mesh_platform, xla_options
from jax_selftrain.distributed.sharding import ShardingRules, shard_host_array
from jax_selftrain.hub import LoadedModel
from jax_selftrain.models import (
    TAIL_LEN,
    DecoderConfig,
    KVCache,
    Params,
    decode_step,
    flush_tail,
    init_cache,
    num_used_blocks,
    unembed,
)
from jax_selftrain.sampling.categorical import categorical, level_sizes, replicate_vocab, take_per_row
from jax_selftrain.sampling.continuous_batching import (
    DecodeSlots,
    DecodeState,
    RequestQueue,
    initial_state,
    padded_output_len,
    per_replica,
    progress_of,
    refill_slots,
)
from jax_selftrain.sampling.counter_rng import token_random_bits
from jax_selftrain.sampling.sampling_params import SamplingParams, full_logsumexp, warp_logits

BLOCK = 256
"""Slots of a settled block on an accelerator."""
CPU_BLOCK_BYTES = 4 << 20
"""On a CPU a block's keys are copied before they are used: few enough to stay in its cache meanwhile."""

REPORT_SECONDS = 1.0
"""About how often the host looks at the loop."""


@dataclass(frozen=True)
class DecodeSpec:
    """What a compiled program depends on beside shapes and policy: a static argument."""

    config: DecoderConfig
    sharding_rules: ShardingRules
    compute_dtype: str
    """Type of matmul operands."""
    cache_dtype: str | None = None
    """Type of settled keys and values: a float type or int8; None: that of matmul operands."""

    def init_cache(self, rows: int, capacity: int) -> KVCache:
        """An empty cache with room for `capacity` settled tokens in each of `rows` rows (over all replicas)."""
        block = min(self._block(rows), -(-capacity // TAIL_LEN) * TAIL_LEN)
        settled = self.cache_dtype or self.compute_dtype
        return init_cache(
            self.config, self.sharding_rules, rows, capacity, self.compute_dtype, settled_dtype=settled, block=block
        )

    def _block(self, rows: int) -> int:
        """Slots of a settled block; a power of two of them, so that growing lengths share their boundaries."""
        if mesh_platform(self.sharding_rules.mesh) != "cpu":
            return BLOCK
        slot = rows // self.sharding_rules.data_parallelism * self.config.num_kv_heads * self.config.head_dim * 4
        return next((block for block in (128, 64) if block * slot <= CPU_BLOCK_BYTES), TAIL_LEN)


@dataclass(frozen=True)
class DecodeProgress:
    """How far a call of `DecodeLoop.draw` has come."""

    num_finished: int
    """Samples that have ended."""
    tokens: int
    """Tokens drawn, those of samples that have not ended included."""
    row_steps: int
    """Tokens that the rows could have drawn in the time: rows × steps."""


@dataclass(frozen=True)
class SampleBatch:
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
    """As in `Tally`."""

    @property
    def utilization(self) -> float:
        """Share of the rows' steps whose token is part of a sample."""
        return float(self.lengths.sum()) / max(self.slots, 1)


def decode_spec(model: LoadedModel, cache_dtype: str | None = None) -> DecodeSpec:
    """The architecture of a loaded model, as it was loaded."""
    return DecodeSpec(model.config, model.sharding_rules, np.dtype(model.compute_dtype).name, cache_dtype)


class DecodeLoop:
    """The loop for samples of one model and policy, with the memory it works in."""

    def __init__(
        self,
        architecture: DecodeSpec,
        sampling_params: SamplingParams,
        params: Params,
        *,
        rows: int,
        queue: int | None = None,
    ):
        """
        Args:
          params: on the mesh of `architecture.sharding_rules`.
          rows: of one replica's batch.
          queue: samples that one call of `draw` can draw on each replica; more than `rows` of them refill rows whose
            sample has ended. Default: `rows`, so that there is nothing to refill with (lockstep).
        """
        self.architecture, self.sampling_params, self.params = architecture, sampling_params, params
        self.rows, self.queue = rows, rows if queue is None else queue
        self._cache: KVCache | None = None

    def generate(
        self,
        keys: UInt32[np.ndarray, "N 2"],
        *,
        progress_callback: Callable[[DecodeProgress], None] = lambda tally: None,
    ) -> SampleBatch:
        """Draw one sample per key.

        Args:
          keys: from `words.sample_keys`; 1 … queue × replicas of them. Replicas take equal shares, in order.
          report: told about once a second how far the call has come; what it raises ends it.
        """
        rules = self.architecture.sharding_rules
        share, more = divmod(len(keys), rules.data_parallelism)
        counts = np.full(rules.data_parallelism, share, np.int32) + (np.arange(rules.data_parallelism) < more)
        if not 0 < len(keys) <= self.queue * rules.data_parallelism:
            raise ValueError(f"{len(keys)} samples do not fit in {rules.data_parallelism} queues of {self.queue}")
        queued = np.zeros((rules.data_parallelism, self.queue, 2), np.uint32)
        for mine, part in zip(queued, np.split(keys, np.cumsum(counts)[:-1]), strict=True):
            mine[: len(part)] = part
        with mesh_context(rules.mesh):
            queue = RequestQueue(
                shard_host_array(rules, queued.reshape(-1, 2), ("batch", None)),
                shard_host_array(rules, counts, ("batch",)),
            )
            state, slots = self._run(queue, progress_callback)
        samples = jax.device_get(state.samples)
        order = np.concatenate([r * (self.queue + 1) + np.arange(n) for r, n in enumerate(counts)])
        drawn = SampleBatch(
            tokens=np.ascontiguousarray(samples.tokens[order, : self.sampling_params.max_tokens]),
            lengths=samples.length[order],
            logprobs=samples.logprobs[order].sum(axis=1, dtype=np.float64).astype(np.float32),
            policy_logprobs=samples.policy_logprobs[order].sum(axis=1, dtype=np.float64).astype(np.float32),
            stopped=samples.stopped[order],
            finite=samples.finite[order],
            slots=slots,
        )
        if drawn.finite.all():  # NaN in a stale slot would spread: its weight is 0, but 0 · NaN is NaN
            self._cache = state.cache
        return drawn

    def _run(self, queue: RequestQueue, report: Callable[[DecodeProgress], None]) -> tuple[DecodeState, int]:
        """Run pages until every sample has ended; the state, and how many tokens the rows could have drawn."""
        programs, architecture, sampling_params = _programs(), self.architecture, self.sampling_params
        rows = self.rows * architecture.sharding_rules.data_parallelism
        cache, self._cache = self._cache, None
        if cache is None:
            cache = programs.empty_cache(architecture, sampling_params, rows)
        state, pages = programs.begin(architecture.sharding_rules, sampling_params, rows, queue, cache), 1
        while True:
            began = time.perf_counter()
            state = programs.run(architecture, sampling_params, self.params, queue, state, np.int32(pages))
            busy, ended, tokens, run = (int(x) for x in jax.device_get(programs.progress(state)))
            tally = DecodeProgress(ended, tokens, run * TAIL_LEN * rows)
            report(tally)
            if not busy:
                return state, tally.row_steps
            if time.perf_counter() - began < REPORT_SECONDS / 2:
                pages *= 2


def decode(
    architecture: DecodeSpec,
    sampling_params: SamplingParams,
    params: Params,
    keys: UInt32[np.ndarray, "N 2"],
    *,
    rows: int,
    queue: int | None = None,
    report: Callable[[DecodeProgress], None] = lambda tally: None,
) -> SampleBatch:
    """`DecodeLoop.draw`, once; the queue takes all samples by default."""
    places = -(-len(keys) // architecture.sharding_rules.data_parallelism) if queue is None else queue
    return DecodeLoop(architecture, sampling_params, params, rows=rows, queue=places).generate(
        keys, progress_callback=report
    )


def empty_cache(architecture: DecodeSpec, sampling_params: SamplingParams, rows: int) -> KVCache:
    """A cache for samples of the policy's length, in `rows` rows over all replicas."""
    return architecture.init_cache(rows, padded_output_len(sampling_params))


def decode_chunks(
    architecture: DecodeSpec,
    sampling_params: SamplingParams,
    params: Params,
    queue: RequestQueue,
    state: DecodeState,
    pages: Int32[Array, ""],
) -> DecodeState:
    """Run up to so many pages, or until every sample has ended: the program that sampling spends its time in.

    Args:
      architecture, sampling_params: static.
      state: its buffers are given up to the result's (donated).
    """
    rules, levels = architecture.sharding_rules, len(level_sizes(architecture.config.vocab_size))

    def next_token_fn(
        hidden: jax.Array, position: jax.Array, before: DecodeSlots
    ) -> tuple[jax.Array, DecodeSlots, Any]:
        logits = next_token_logits(architecture, params, hidden)
        masked = warp_logits(logits, sampling_params)
        token, masked_total = categorical(masked, token_random_bits(before.key, position, levels))
        total = full_logsumexp(logits, sampling_params, masked_total)
        finite = jnp.isfinite(total)
        active = ~before.done
        stop = jnp.zeros_like(active)
        for stop_id in sampling_params.stop_ids:
            stop = stop | (token == stop_id)
        length = before.length + active
        after = replace(
            before,
            length=length,
            done=before.done | stop | ~finite | (length >= sampling_params.max_tokens),
            stopped=before.stopped | (active & stop),
            finite=before.finite & (finite | before.done),
        )
        drawn = (token, take_per_row(logits, token) - total, take_per_row(masked, token) - masked_total)
        return token, after, tuple(jnp.where(active, x, 0) for x in drawn)

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.pages < last) & ~jnp.all(state.rows.done)

    def page(state: DecodeState) -> DecodeState:
        cache, token, rows, drawn = decode_chunk(
            architecture, params, state.cache, state.rows.cache_len, state.rows.token, state.rows, next_token_fn
        )
        rows, following, samples = per_replica(rules, refill_slots, sampling_params)(
            replace(rows, token=token), state.next_index, queue, state.samples, drawn
        )
        return DecodeState(cache, rows, following, samples, state.pages + 1)

    last = state.pages + pages
    return jax.lax.while_loop(unfinished, page, state)


def decode_chunk(
    architecture: DecodeSpec,
    params: Params,
    cache: KVCache,
    settled: jax.Array,
    token: jax.Array,
    loop_state: Any,
    advance: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any, Any]],
) -> tuple[KVCache, jax.Array, Any, Any]:
    """Decode PAGE steps behind the `settled` tokens [B] of each row, and flush them.

    Args:
      token: [B], fed first.
      advance: (hidden [B, D], position [B], carry) → (next token [B], carry, out).

    Returns:
      The cache with one more settled page, the next token, the carry, and the PAGE outs stacked.
    """
    blocks = num_used_blocks(cache, settled)

    def step(state: tuple, offset: jax.Array) -> tuple[tuple, Any]:
        (page_k, page_v), token, carry = state
        position = settled + offset
        hidden, stepped = decode_step(
            architecture.config,
            architecture.sharding_rules,
            params,
            cache.with_tail(page_k, page_v),
            token,
            position,
            settled,
            blocks,
            offset,
            compute_dtype=architecture.compute_dtype,
        )
        token, carry, out = advance(hidden, position, carry)
        return ((stepped.page_k, stepped.page_v), token, carry), out

    begin = ((cache.page_k, cache.page_v), token, loop_state)
    (page, token, loop_state), outs = jax.lax.scan(step, begin, jnp.arange(TAIL_LEN, dtype=jnp.int32))
    return flush_tail(architecture.sharding_rules, cache.with_tail(*page), settled), token, loop_state, outs


def next_token_logits(architecture: DecodeSpec, params: Params, hidden: jax.Array) -> jax.Array:
    """Logits [B, V] in fp32, the vocabulary whole on every device of a replica."""
    config, rules, dtype = architecture.config, architecture.sharding_rules, architecture.compute_dtype
    return replicate_vocab(unembed(config, rules, params, hidden[:, None], compute_dtype=dtype)[:, 0])


@dataclass(frozen=True)
class _Programs:
    """The functions above, compiled."""

    empty_cache: Callable[..., KVCache]
    begin: Callable[..., DecodeState]
    run: Callable[..., DecodeState]
    progress: Callable[[DecodeState], tuple[jax.Array, ...]]


@cache
def _programs() -> _Programs:
    return _Programs(
        empty_cache=jax.jit(empty_cache, static_argnums=(0, 1, 2)),
        begin=jax.jit(initial_state, static_argnums=(0, 1, 2), donate_argnums=(4,)),
        run=jax.jit(decode_chunks, static_argnums=(0, 1), donate_argnums=(4,), compiler_options=xla_options()),
        progress=jax.jit(progress_of),
    )
