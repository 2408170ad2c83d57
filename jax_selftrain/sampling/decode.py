"""The decode loop of sampling without prompts, in chunks of 32 steps.

Every sample starts with the same tokens, so that all slots share one offset in the tail of the cache. The whole chunks
of the start tokens are prefilled once: a refilled slot keeps them in its first committed blocks. The remaining ones
are forced through the decode steps. A chunk is a `lax.scan` over `models.decode_step`. At its end each replica, by
itself, flushes the tail of every slot behind its committed blocks, stores the outputs, and refills slots whose sample
has ended. A `lax.while_loop` runs chunks; one program serves samples of any length.

A sample depends on its key and the parameters alone: not on its slot, its neighbors, or its start. Slots share only the
number of cache blocks read and of chunks run, and neither changes a bit of a slot (see `models.kv_cache`). Tokens drawn
between the end of a sample and the end of its chunk are discarded.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jax_selftrain.distributed.mesh import mesh_context, mesh_platform, xla_options
from jax_selftrain.distributed.sharding import ShardingRules, shard_host_array
from jax_selftrain.hub import LoadedModel
from jax_selftrain.models import DecoderConfig, Params, unembed
from jax_selftrain.models.kv_cache import (
    TAIL_LEN,
    KVCache,
    decode_step,
    flush_tail,
    init_cache,
    num_used_blocks,
    prefill,
)
from jax_selftrain.sampling.categorical import categorical, level_sizes, replicate_vocab, take_per_row
from jax_selftrain.sampling.continuous_batching import (
    DecodeSlots,
    DecodeState,
    RequestQueue,
    count_progress,
    initial_state,
    per_replica,
    refill_slots,
)
from jax_selftrain.sampling.counter_rng import token_random_bits
from jax_selftrain.sampling.sampling_params import SamplingParams, full_logsumexp, warp_logits

BLOCK_SIZE = 256
"""Positions of a committed block on an accelerator."""
CPU_BLOCK_BYTES = 4 << 20
"""A CPU copies the keys of a block before it uses them; this size stays in its cache."""

REPORT_SECONDS = 1.0
"""Approximate interval of progress reports."""


@dataclass(frozen=True)
class DecodeSpec:
    """Static arguments of the compiled programs, besides shapes and sampling parameters."""

    config: DecoderConfig
    sharding_rules: ShardingRules
    compute_dtype: str
    """Type of matmul operands."""
    cache_dtype: str | None = None
    """Type of committed keys and values: a float type or int8; None: `compute_dtype`."""

    @classmethod
    def from_model(cls, model: LoadedModel, cache_dtype: str | None = None) -> "DecodeSpec":
        """Take config, sharding rules and compute type from a loaded model."""
        return cls(model.config, model.sharding_rules, np.dtype(model.compute_dtype).name, cache_dtype)

    def init_cache(self, num_slots: int, capacity: int) -> KVCache:
        """Create an empty cache for `num_slots` slots (of all replicas)."""
        return init_cache(
            self.config,
            self.sharding_rules,
            num_slots,
            capacity,
            self.compute_dtype,
            committed_dtype=self.cache_dtype or self.compute_dtype,
            block_size=min(self._block_size(num_slots), -(-capacity // TAIL_LEN) * TAIL_LEN),
        )

    def _block_size(self, num_slots: int) -> int:
        """Choose a power of two: block boundaries are independent of the capacity."""
        if mesh_platform(self.sharding_rules.mesh) != "cpu":
            return BLOCK_SIZE
        per_replica_slots = num_slots // self.sharding_rules.data_parallelism
        position_bytes = per_replica_slots * self.config.num_kv_heads * self.config.head_dim * 4
        return next((size for size in (128, 64) if size * position_bytes <= CPU_BLOCK_BYTES), TAIL_LEN)


class DecodeProgress(NamedTuple):
    """Progress of a call of `DecodeLoop.generate`."""

    num_finished: int
    """Finished samples."""
    tokens: int
    """Tokens drawn, those of unfinished samples included."""
    slot_steps: int
    """Slots × steps: the number of tokens at full utilization."""


@dataclass(frozen=True)
class SampleBatch:
    """Samples on the host, in the order of their keys."""

    tokens: Int32[np.ndarray, "samples T"]
    """0 after the end of a sample."""
    lengths: Int32[np.ndarray, " samples"]
    logprobs: Float32[np.ndarray, " samples"]
    """Sum over the tokens of a sample of their log-probability at temperature 1 over the whole, unmasked vocabulary."""
    policy_logprobs: Float32[np.ndarray, " samples"]
    """The same under the warped logits."""
    stopped: Bool[np.ndarray, " samples"]
    """True: ended by a stop id; False: by length."""
    finite: Bool[np.ndarray, " samples"]
    """False if the model's logits were NaN or +inf: the sample is meaningless."""
    slot_steps: int
    """See `DecodeProgress`."""

    @property
    def utilization(self) -> float:
        """Share of slot steps whose token is part of a sample."""
        return float(self.lengths.sum()) / max(self.slot_steps, 1)


class DecodeLoop:
    """A decode loop for one model, with its cache.

    Args:
      params: on the mesh of `spec.sharding_rules`.
      num_slots: per replica.
      queue_size: maximum number of samples of one call of `generate` per replica.
    """

    def __init__(
        self, spec: DecodeSpec, sampling_params: SamplingParams, params: Params, *, num_slots: int, queue_size: int
    ):
        self.spec, self.sampling_params, self.params = spec, sampling_params, params
        self.num_slots, self.queue_size = num_slots, queue_size
        self._cache: KVCache | None = None

    def generate(
        self,
        keys: UInt32[np.ndarray, "samples 2"],
        *,
        progress_callback: Callable[[DecodeProgress], None] = lambda progress: None,
    ) -> SampleBatch:
        """Draw one sample per key.

        Args:
          keys: from `per_sample_keys`, at most queue_size × replicas; replicas take equal shares, in order.
          progress_callback: called about once a second; an exception from it ends the call.
        """
        rules = self.spec.sharding_rules
        share, more = divmod(len(keys), rules.data_parallelism)
        counts = np.full(rules.data_parallelism, share, np.int32) + (np.arange(rules.data_parallelism) < more)
        if not 0 < len(keys) <= self.queue_size * rules.data_parallelism:
            raise ValueError(f"{len(keys)} samples do not fit in {rules.data_parallelism} queues of {self.queue_size}")
        queued = np.zeros((rules.data_parallelism, self.queue_size, 2), np.uint32)
        for entries, shard in zip(queued, np.split(keys, np.cumsum(counts)[:-1]), strict=True):
            entries[: len(shard)] = shard
        with mesh_context(rules.mesh):
            queue = RequestQueue(
                shard_host_array(rules, queued.reshape(-1, 2), ("batch", None)),
                shard_host_array(rules, counts, ("batch",)),
            )
            state, slot_steps = self._run(queue, progress_callback)
        samples, forced = jax.device_get(state.samples), self.sampling_params.num_forced
        order = np.concatenate([r * (self.queue_size + 1) + np.arange(n) for r, n in enumerate(counts)])
        batch = SampleBatch(
            tokens=np.ascontiguousarray(samples.tokens[order][:, forced : forced + self.sampling_params.max_tokens]),
            lengths=samples.length[order],
            logprobs=samples.logprobs[order].sum(axis=1, dtype=np.float64).astype(np.float32),
            policy_logprobs=samples.policy_logprobs[order].sum(axis=1, dtype=np.float64).astype(np.float32),
            stopped=samples.stopped[order],
            finite=samples.finite[order],
            slot_steps=slot_steps,
        )
        if batch.finite.all():  # a masked NaN would spread: 0 · NaN is NaN
            self._cache = state.cache
        return batch

    def _run(self, queue: RequestQueue, report: Callable[[DecodeProgress], None]) -> tuple[DecodeState, int]:
        """Decode all samples; return the state and the slot steps."""
        run, spec, sampling_params = _jit_decode_chunks(), self.spec, self.sampling_params
        num_slots = self.num_slots * spec.sharding_rules.data_parallelism
        cache, self._cache = self._cache, None
        if cache is None:
            prefilled_ids = np.asarray(sampling_params.start_ids[: sampling_params.prefilled_len], np.int32)
            cache = prefill_cache(
                spec,
                sampling_params.prefilled_len + sampling_params.output_len,
                self.params,
                shard_host_array(spec.sharding_rules, np.tile(prefilled_ids, (num_slots, 1)), ("batch", None)),
            )
        state, chunks = _begin(spec.sharding_rules, sampling_params, num_slots, queue, cache), 1
        while True:
            start = time.perf_counter()
            state = run(spec, sampling_params, self.params, queue, state, np.int32(chunks))
            busy, finished, tokens, num_chunks = (int(x) for x in jax.device_get(_count_progress(state)))
            progress = DecodeProgress(finished, tokens, num_chunks * TAIL_LEN * num_slots)
            report(progress)
            if not busy:
                return state, progress.slot_steps
            if time.perf_counter() - start < REPORT_SECONDS / 2:
                chunks *= 2


def decode_chunks(
    spec: DecodeSpec,
    sampling_params: SamplingParams,
    params: Params,
    queue: RequestQueue,
    state: DecodeState,
    max_chunks: Int32[Array, ""],
) -> DecodeState:
    """Run chunks until every sample has ended: the main program of sampling.

    Args:
      spec, sampling_params: static.
      state: may be donated.
      max_chunks: limit of this call.
    """
    rules, levels = spec.sharding_rules, len(level_sizes(spec.config.vocab_size))
    start_ids = np.asarray(sampling_params.start_ids, np.int32)

    def next_token_fn(hidden: Array, position: Array, before: DecodeSlots) -> tuple[Array, DecodeSlots, Any]:
        logits = compute_logits(spec, params, hidden)
        index = position - (len(start_ids) - 1)  # of the drawn token in its sample
        warped = warp_logits(logits, sampling_params, index)
        token, warped_logsumexp = categorical(warped, token_random_bits(before.key, index, levels))
        logsumexp = full_logsumexp(logits, sampling_params, warped_logsumexp)
        finite = jnp.isfinite(logsumexp)
        active = ~before.done
        if sampling_params.num_forced:
            is_forced = index < 0
            following = (
                jnp.asarray(start_ids)
                .at[jnp.minimum(position, len(start_ids) - 2) + 1]
                .get(out_sharding=rules.sharding(("batch",)))
            )
            token, active = jnp.where(is_forced, following, token), active & ~is_forced
        stop = jnp.zeros_like(active)
        for stop_id in sampling_params.stop_ids:
            stop = stop | (token == stop_id)
        length = before.length + active
        after = replace(
            before,
            length=length,
            done=before.done | (active & stop) | ~finite | (length >= sampling_params.max_tokens),
            stopped=before.stopped | (active & stop),
            finite=before.finite & (finite | before.done),
        )
        outputs = (token, take_per_row(logits, token) - logsumexp, take_per_row(warped, token) - warped_logsumexp)
        return token, after, tuple(jnp.where(active, x, 0) for x in outputs)

    def is_unfinished(state: DecodeState) -> Array:
        return (state.num_chunks < end) & ~jnp.all(state.slots.done)

    def run_chunk(state: DecodeState) -> DecodeState:
        cache, token, slots, outputs = decode_chunk(
            spec, params, state.cache, state.slots.committed_len, state.slots.token, state.slots, next_token_fn
        )
        slots, next_index, samples = per_replica(rules, refill_slots, sampling_params)(
            replace(slots, token=token), state.next_index, queue, state.samples, outputs
        )
        return DecodeState(cache, slots, next_index, samples, state.num_chunks + 1)

    end = state.num_chunks + max_chunks
    return jax.lax.while_loop(is_unfinished, run_chunk, state)


def decode_chunk(
    spec: DecodeSpec,
    params: Params,
    cache: KVCache,
    committed_len: Array,
    token: Array,
    loop_state: Any,
    next_token_fn: Callable[[Array, Array, Any], tuple[Array, Any, Any]],
) -> tuple[KVCache, Array, Any, Any]:
    """Decode TAIL_LEN steps and flush the tail of the cache.

    Args:
      committed_len: [B], tokens of each slot in committed blocks.
      token: [B], input of the first step.
      next_token_fn: (hidden [B, D], position [B], loop state) → (next token [B], loop state, outputs).

    Returns:
      The cache with TAIL_LEN more committed tokens, the next token, the loop state, and the outputs [TAIL_LEN, …].
    """
    num_blocks = num_used_blocks(cache, committed_len)

    def step(state: tuple, offset: Array) -> tuple[tuple, Any]:
        tail, token, loop_state = state
        position = committed_len + offset
        hidden, stepped = decode_step(
            spec.config,
            spec.sharding_rules,
            params,
            replace(cache, tail=tail),
            token,
            position,
            committed_len,
            num_blocks,
            offset,
            compute_dtype=spec.compute_dtype,
        )
        token, loop_state, outputs = next_token_fn(hidden, position, loop_state)
        return (stepped.tail, token, loop_state), outputs

    begin = (cache.tail, token, loop_state)
    (tail, token, loop_state), outputs = jax.lax.scan(step, begin, jnp.arange(TAIL_LEN, dtype=jnp.int32))
    return flush_tail(spec.sharding_rules, replace(cache, tail=tail), committed_len), token, loop_state, outputs


def compute_logits(spec: DecodeSpec, params: Params, hidden: Float32[Array, "B D"]) -> Float32[Array, "B V"]:
    """Unembed hidden states and all-gather the vocabulary."""
    logits = unembed(spec.config, spec.sharding_rules, params, hidden[:, None], compute_dtype=spec.compute_dtype)
    return replicate_vocab(logits[:, 0])


@partial(jax.jit, static_argnums=(0, 1))
def prefill_cache(spec: DecodeSpec, capacity: int, params: Params, tokens: Int32[Array, "B T"]) -> KVCache:
    """Create a cache whose first T committed positions hold the tokens."""
    cache = spec.init_cache(tokens.shape[0], capacity)
    if not tokens.shape[1]:
        return cache
    return prefill(spec.config, spec.sharding_rules, params, cache, tokens, compute_dtype=spec.compute_dtype)


_begin = jax.jit(initial_state, static_argnums=(0, 1, 2), donate_argnums=(4,))
_count_progress = jax.jit(count_progress)


@cache
def _jit_decode_chunks() -> Callable[..., DecodeState]:
    """Compile on first use: `xla_options` depends on the devices."""
    return jax.jit(decode_chunks, static_argnums=(0, 1), donate_argnums=(4,), compiler_options=xla_options())
