"""The decode loop: all rows in lockstep from the start token, one page of 32 tokens after another.

BOS-only sampling makes this simple. Every row starts at position 0 with the same token, so no row waits for a prefill
and all rows share one cache offset. A page is a `lax.scan` over `models.decode_step`; at its end the page is flushed
behind the settled cache. Within a segment of fixed cache capacity a `lax.while_loop` runs pages until the capacity is
used up or every row has ended; between segments the cache doubles. So attention never reads much more than has been
written, and a handful of programs serves any length.

A row's result depends on its key and the parameters alone: rows meet only in "has every row ended", which decides how
many more pages run, not what is in them. What is drawn after a row's end is never looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
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
    flush_page,
    grow_cache,
    init_cache,
    project,
)
from jax_selftrain.sampling.draw import draw, take, tree_widths, whole_rows
from jax_selftrain.sampling.policy import Policy, mask_logits
from jax_selftrain.sampling.words import token_words

FIRST_CAPACITY = 64
"""Settled slots of the first segment; each further segment has twice as many, the last just enough."""


@dataclass(frozen=True)
class Architecture:
    """What a compiled program depends on beside shapes and policy: a static argument."""

    config: DecoderConfig
    layout: Layout
    compute_dtype: str
    """Type of matmul operands and cache."""


@partial(jax.tree_util.register_dataclass, data_fields=["done", "stopped", "finite", "length"], meta_fields=[])
@dataclass(frozen=True)
class Progress:
    """How far each row has come."""

    done: Bool[Array, " B"]
    """Rows that have ended (or never counted)."""
    stopped: Bool[Array, " B"]
    """Rows that ended by a stop id."""
    finite: Bool[Array, " B"]
    """False for rows whose logits gave no distribution (NaN or +inf)."""
    length: Int32[Array, " B"]
    """Tokens drawn, the stop id included."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "pages", "token", "progress", "tokens", "logprobs"],
    meta_fields=[],
)
@dataclass(frozen=True)
class DecodeState:
    """Everything between two pages."""

    cache: Cache
    pages: Int32[Array, ""]
    """Pages filled so far."""
    token: Int32[Array, " B"]
    """What each row is fed next."""
    progress: Progress
    tokens: Int32[Array, "T B"]
    """Tokens drawn, 0 after a row's end; T is the length limit rounded up to whole pages."""
    logprobs: Float32[Array, "T B"]
    """Log-probability of each at temperature 1 over the whole vocabulary, 0 after a row's end."""


@dataclass(frozen=True)
class Drawn:
    """Samples on the host, in the order of their rows."""

    tokens: Int32[np.ndarray, "B T"]
    """0 after a row's end."""
    lengths: Int32[np.ndarray, " B"]
    logprobs: Float32[np.ndarray, " B"]
    """Sum over a row's tokens of their log-probability at temperature 1 over the whole, unmasked vocabulary."""
    stopped: Bool[np.ndarray, " B"]
    """Ended by a stop id; the others by length."""
    finite: Bool[np.ndarray, " B"]
    """False where the model's logits were NaN or +inf: the row is meaningless."""


def architecture_of(model: LoadedModel) -> Architecture:
    """The architecture of a loaded model, as it was loaded."""
    return Architecture(model.config, model.layout, np.dtype(model.compute_dtype).name)


def capacities(steps: int) -> tuple[int, ...]:
    """Cache capacities of the successive segments that decode so many tokens."""
    needed = -(-steps // PAGE) * PAGE
    growing: list[int] = []
    while (capacity := FIRST_CAPACITY << len(growing)) < needed:
        growing.append(capacity)
    return (*growing, needed)


def decode(
    architecture: Architecture,
    policy: Policy,
    params: Params,
    keys: UInt32[np.ndarray, "B 2"],
    active: Bool[np.ndarray, " B"],
) -> Drawn:
    """Draw one sample per row.

    Args:
      params: on the mesh of `architecture.layout`.
      keys: from `words.sample_keys`; B is a multiple of the mesh's `data` axis.
      active: rows that count. The others are dummies that keep the shape; their results mean nothing.
    """
    layout = architecture.layout
    with jax.set_mesh(layout.mesh):
        keys_there = place(layout, keys, ("batch", None))
        segments = capacities(policy.max_tokens)
        state = _start(architecture, policy, len(keys), segments[0], place(layout, ~active, ("batch",)))
        for capacity in segments:
            if capacity > state.cache.capacity:
                if bool(jnp.all(state.progress.done)):
                    break
                state = replace(state, cache=_grow(layout, state.cache, capacity))
            state = _decode_segment(architecture, policy, params, keys_there, state)
    progress = jax.device_get(state.progress)
    logprobs = np.asarray(jax.device_get(state.logprobs), np.float64).sum(axis=0).astype(np.float32)
    return Drawn(
        tokens=np.ascontiguousarray(jax.device_get(state.tokens).T[:, : policy.max_tokens]),
        lengths=progress.length,
        logprobs=logprobs,
        stopped=progress.stopped,
        finite=progress.finite,
    )


def initial_state(
    architecture: Architecture, policy: Policy, rows: int, capacity: int, done: Bool[Array, " B"]
) -> DecodeState:
    """The state before the first token, with room for `capacity` settled tokens per row."""
    layout = architecture.layout
    batch, steps = layout.sharding(("batch",)), layout.sharding((None, "batch"))
    length = capacities(policy.max_tokens)[-1]

    def full(value: bool | int, dtype: jax.typing.DTypeLike) -> jax.Array:
        return jax.reshard(jnp.full((rows,), value, dtype), batch)

    return DecodeState(
        cache=init_cache(architecture.config, layout, rows, capacity, architecture.compute_dtype),
        pages=jnp.zeros((), jnp.int32),
        token=full(policy.start_id, jnp.int32),
        progress=Progress(done=done, stopped=full(False, bool), finite=full(True, bool), length=full(0, jnp.int32)),
        tokens=jnp.zeros((length, rows), jnp.int32, out_sharding=steps),
        logprobs=jnp.zeros((length, rows), jnp.float32, out_sharding=steps),
    )


def decode_segment(
    architecture: Architecture, policy: Policy, params: Params, keys: UInt32[Array, "B 2"], state: DecodeState
) -> DecodeState:
    """Run pages until the cache is full or every row has ended: the program that sampling spends its time in.

    Args:
      architecture, policy: static.
      keys: from `words.sample_keys`, sharded on the batch.
      state: its buffers are given up to the result's (donated).
    """
    levels = len(tree_widths(architecture.config.vocab_size))

    def advance(hidden: jax.Array, position: jax.Array, before: Progress) -> tuple[jax.Array, Progress, Any]:
        logits = logits_of(architecture, params, hidden)
        log_total = jax.nn.logsumexp(logits, axis=-1)
        token = draw(mask_logits(logits, policy), token_words(keys, position, levels))
        logprob = take(logits, token) - log_total
        active, finite = ~before.done, jnp.isfinite(log_total)
        stop = jnp.zeros_like(active)
        for stop_id in policy.stop_ids:
            stop = stop | (token == stop_id)
        length = before.length + active
        after = Progress(
            done=before.done | stop | ~finite | (length >= policy.max_tokens),
            stopped=before.stopped | (active & stop),
            finite=before.finite & (finite | before.done),
            length=length,
        )
        return token, after, (jnp.where(active, token, 0), jnp.where(active, logprob, 0.0))

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.pages < state.cache.capacity // PAGE) & ~jnp.all(state.progress.done)

    def page(state: DecodeState) -> DecodeState:
        cache, token, progress, (tokens, logprobs) = decode_page(
            architecture, params, state.cache, state.pages, state.token, state.progress, advance
        )
        start = (state.pages * PAGE, jnp.int32(0))
        return DecodeState(
            cache=cache,
            pages=state.pages + 1,
            token=token,
            progress=progress,
            tokens=jax.lax.dynamic_update_slice(state.tokens, tokens, start),
            logprobs=jax.lax.dynamic_update_slice(state.logprobs, logprobs, start),
        )

    return jax.lax.while_loop(unfinished, page, state)


def decode_page(
    architecture: Architecture,
    params: Params,
    cache: Cache,
    pages: jax.Array,
    token: jax.Array,
    carry: Any,
    advance: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any, Any]],
) -> tuple[Cache, jax.Array, Any, Any]:
    """Decode PAGE steps behind `pages` full pages, and flush them.

    Args:
      token: [B], fed first.
      advance: (hidden [B, D], position, carry) → (next token [B], carry, out).

    Returns:
      The cache with one more settled page, the next token, the carry, and the PAGE outs stacked.
    """
    settled = pages * PAGE

    def step(state: tuple, offset: jax.Array) -> tuple[tuple, Any]:
        cache, token, carry = state
        position = settled + offset
        hidden, cache = decode_step(
            architecture.config,
            architecture.layout,
            params,
            cache,
            token,
            position + jnp.zeros_like(token),
            settled,
            offset,
            compute_dtype=architecture.compute_dtype,
        )
        token, carry, out = advance(hidden, position, carry)
        return (cache, token, carry), out

    (cache, token, carry), outs = jax.lax.scan(step, (cache, token, carry), jnp.arange(PAGE, dtype=jnp.int32))
    return flush_page(architecture.layout, cache, settled), token, carry, outs


def logits_of(architecture: Architecture, params: Params, hidden: jax.Array) -> jax.Array:
    """Logits [B, V] in fp32, the vocabulary whole on every device of a replica."""
    config, layout, dtype = architecture.config, architecture.layout, architecture.compute_dtype
    return whole_rows(project(config, layout, params, hidden, compute_dtype=dtype))


_decode_segment = jax.jit(decode_segment, static_argnums=(0, 1), donate_argnums=(4,))
_start = jax.jit(initial_state, static_argnums=(0, 1, 2, 3))
_grow = jax.jit(grow_cache, static_argnums=(0, 2))
