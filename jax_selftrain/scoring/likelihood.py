"""The likelihood engine: log p(continuation | context) of many token sequences at once.

Three things make it cheap. (1) Only continuation positions are projected to the vocabulary: their hidden states are
gathered on the device that holds them and go through the output matrix in chunks, so that no `[B, T, V]` ever exists.
(2) Inputs are padded to one of a few lengths, each with a fixed number of rows: a handful of programs serves any task.
(3) The longest come first: if memory is short, it is short at once.

Padding stands to the right of the text, where under the causal mask no real position can see it. Since a length has
*one* batch shape, the number a request gets does not depend on which other requests are scored with it.

Inputs longer than the model lose tokens on the left, as in lm-evaluation-harness 0.4.13
(`HFLM._loglikelihood_tokens`): input = (context + continuation)[-(max_positions + 1):][:-1].
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_selftrain import hub
from jax_selftrain.config import ScoreConfig
from jax_selftrain.errors import InputError
from jax_selftrain.mesh import Layout, make_layout, place
from jax_selftrain.models import (
    DecoderConfig,
    Params,
    abstract_params,
    axis_sizes,
    forward,
    param_shardings,
    project,
)

SHORTEST = 32
"""Inputs shorter than this are padded to it."""
CHUNK = 512
"""Positions that one device projects together: at V = 50k their fp32 logits take 100 MB."""
IN_FLIGHT = 2
"""Batches handed to the device before the first result is awaited, so that it never idles."""


class Request(NamedTuple):
    """What is asked: token ids of the text before, and of the text whose probability is wanted (both non-empty)."""

    context: Sequence[int]
    continuation: Sequence[int]


class TokenScores(NamedTuple):
    """The answer, token by token of the continuation."""

    logprobs: np.ndarray
    """[n] float32, nats: log-probability of each token given everything before it."""
    greedy: np.ndarray
    """[n] int32: the most probable token at each place (the lowest id among equals)."""


class Likelihood(NamedTuple):
    """The answer, summed up."""

    loglikelihood: float
    """Nats; fp32 terms added in fp64."""
    is_greedy: bool
    """Whether every token of the continuation is the most probable one at its place."""
    tokens: int
    """Length of the continuation."""


class _Batch(NamedTuple):
    members: list[int]
    """Indices of the requests that fill the first rows."""
    tokens: np.ndarray
    """[B, T] int32."""
    slots: np.ndarray
    """[S, P] int32: per device along `data`, where in its own B/S·T positions the continuations are predicted."""
    targets: np.ndarray
    """[S, P] int32: the tokens predicted there."""
    counts: list[int]
    """Continuation tokens of each member."""


def loglikelihoods(
    model: hub.LoadedModel,
    requests: Sequence[Request | tuple[Sequence[int], Sequence[int]]],
    *,
    batch_tokens: int = 8192,
) -> list[Likelihood]:
    """Log-likelihood of each continuation given its context.

    Args:
      model: from `hub.load_model`.
      requests: pairs of token ids (context, continuation), both non-empty.
      batch_tokens: token positions in one device batch, over the whole mesh.

    Returns:
      One `Likelihood` per request, in their order. NaN log-likelihoods are passed on, for the caller to name.

    Raises:
      InputError: a request is empty, has ids outside the vocabulary, or a continuation longer than the model.
    """
    return [
        Likelihood(
            float(np.sum(scores.logprobs, dtype=np.float64)),
            bool(np.array_equal(scores.greedy, np.asarray(request[1]))),
            len(scores.logprobs),
        )
        for request, scores in zip(requests, token_scores(model, requests, batch_tokens=batch_tokens), strict=True)
    ]


def token_scores(
    model: hub.LoadedModel,
    requests: Sequence[Request | tuple[Sequence[int], Sequence[int]]],
    *,
    batch_tokens: int = 8192,
) -> list[TokenScores]:
    """As `loglikelihoods`, but token by token."""
    checked = [_checked(model.config, i, *request) for i, request in enumerate(requests)]
    results: list[TokenScores | None] = [None] * len(checked)
    pending: deque[tuple[_Batch, Any]] = deque()

    def settle() -> None:
        batch, (logprobs, greedy) = pending.popleft()
        for index, scores in zip(batch.members, _split(batch, np.asarray(logprobs), np.asarray(greedy)), strict=True):
            results[index] = scores

    with jax.set_mesh(model.layout.mesh):
        for length, members in _with_progress(_plan(model.config, model.layout, checked, batch_tokens)):
            batch = _padded_batch(
                model.layout, checked, members, batch_rows(model.layout, length, batch_tokens), length
            )
            pending.append((batch, _run(model, batch)))
            if len(pending) > IN_FLIGHT:
                settle()
        while pending:
            settle()
    return [scores for scores in results if scores is not None]


def bucket_lengths(max_positions: int) -> list[int]:
    """The input lengths that are compiled for: 2^k and 1½·2^k below the model's longest, and that one.

    Steps of a factor 1½ at most: padding to powers of two alone made stories of 320 tokens twice as slow.
    """
    powers = [SHORTEST << k for k in range(max_positions.bit_length())]
    return [*sorted(n for power in powers for n in (power, power * 3 // 2) if n < max_positions), max_positions]


def batch_rows(layout: Layout, length: int, batch_tokens: int) -> int:
    """Rows of a batch of inputs of this length: about `batch_tokens` positions, and a multiple of the data axis."""
    return max(1, batch_tokens // (length * layout.data)) * layout.data


def score_batch(
    config: DecoderConfig,
    layout: Layout,
    compute_dtype: DTypeLike,
    params: Params,
    tokens: Int[Array, "B T"],
    slots: Int[Array, "S P"],
    targets: Int[Array, "S P"],
    chunks: Int[Array, ""],
) -> tuple[Float[Array, "S P"], Int[Array, "S P"]]:
    """Score the continuation positions of one padded batch; S devices along `data` hold B/S rows each.

    Args:
      config, layout, compute_dtype: static.
      params: the model.
      tokens: inputs, padded on the right.
      slots: positions to score, as indices into the B/S·T positions of the same device.
      targets: the token predicted at each of them.
      chunks: how many chunks of `CHUNK` slots are in use on the fullest device.

    Returns:
      Log-probability of each target (nats, fp32) and the most probable token there, whole on every device.
    """
    hidden = forward(config, layout, params, tokens, compute_dtype=compute_dtype)
    own = layout.sharding(("batch", None, None))
    hidden = jnp.reshape(hidden, (layout.data, -1, hidden.shape[-1]), out_sharding=own)
    size = _chunk_size(slots.shape[1])
    data, replicated = PartitionSpec("data"), PartitionSpec()
    # A gather across all rows would move hidden states between devices; each device needs only its own.
    gather = jax.shard_map(
        lambda rows, index: jnp.take_along_axis(rows, index[..., None], axis=1), in_specs=(data, data), out_specs=data
    )

    def score_chunk(i: Array, done: tuple[Array, Array]) -> tuple[Array, Array]:
        at = jax.lax.dynamic_slice_in_dim(slots, i * size, size, axis=1)
        wanted = jax.lax.dynamic_slice_in_dim(targets, i * size, size, axis=1)
        logits = project(config, layout, params, gather(hidden, at), compute_dtype=compute_dtype)
        new = logprobs_and_argmax(logits, wanted)
        logprobs, greedy = (
            jax.lax.dynamic_update_slice_in_dim(old, part, i * size, axis=1)
            for old, part in zip(done, new, strict=True)
        )
        return logprobs, greedy

    nothing = (jnp.zeros_like(targets, jnp.float32), jnp.zeros_like(targets))
    logprobs, greedy = jax.lax.fori_loop(0, chunks, score_chunk, nothing)
    return jax.reshard(logprobs, replicated), jax.reshard(greedy, replicated)


def batch_program(
    config: DecoderConfig, layout: Layout, dtype: DTypeLike, batch_tokens: int, length: int
) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
    """The computation for inputs of one length: function, abstract arguments with shardings, donated arguments."""
    rows = batch_rows(layout, length, batch_tokens)
    shardings = param_shardings(config, layout)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_params(config, dtype),
        shardings,
    )
    per_device = layout.sharding(("batch", None))
    slots = jax.ShapeDtypeStruct((layout.data, _slots(layout, rows, length)), jnp.int32, sharding=per_device)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=per_device)
    chunks = jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.sharding(()))
    return partial(score_batch, config, layout, dtype), (params, tokens, slots, slots, chunks), ()


def program(config: ScoreConfig, mesh: Mesh) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
    """The stage's largest computation: a batch of the longest inputs. Reads the model's config, not its weights."""
    decoder, _ = hub.read_config(config.model)
    layout = make_layout(config.preset, mesh, axis_sizes(decoder))
    return batch_program(decoder, layout, jnp.dtype(config.dtype), config.batch_tokens, decoder.max_positions)


_score_batch = jax.jit(score_batch, static_argnums=(0, 1, 2))


def _run(model: hub.LoadedModel, batch: _Batch) -> tuple[jax.Array, jax.Array]:
    layout = model.layout
    longest = max(int(np.count_nonzero(row >= 0)) for row in batch.slots)
    size = _chunk_size(batch.slots.shape[1])
    arrays = (
        place(layout, array, axes)
        for array, axes in (
            (batch.tokens, ("batch", None)),
            (np.maximum(batch.slots, 0), ("batch", None)),
            (batch.targets, ("batch", None)),
            (np.asarray(-(-longest // size), np.int32), ()),
        )
    )
    return _score_batch(model.config, layout, model.compute_dtype, model.params, *arrays)


def _checked(
    config: DecoderConfig, index: int, context: Sequence[int], continuation: Sequence[int]
) -> tuple[np.ndarray, int]:
    """Input and target tokens in one array (the last one is a target only), and how many are targets."""
    if not len(context) or not len(continuation):
        raise InputError(f"request {index}: context and continuation must each have at least one token")
    whole = np.concatenate([np.asarray(context, np.int64), np.asarray(continuation, np.int64)])
    if len(continuation) > config.max_positions:
        raise InputError(
            f"request {index}: a continuation of {len(continuation)} tokens is longer than the model's "
            f"{config.max_positions} positions; cut it"
        )
    if whole.min() < 0 or whole.max() >= config.vocab_size:
        raise InputError(
            f"request {index}: token id {whole.max() if whole.min() >= 0 else whole.min()} is not in the model's "
            f"vocabulary of {config.vocab_size}; is the tokenizer this model's own?"
        )
    return whole[-(config.max_positions + 1) :].astype(np.int32), len(continuation)


def _plan(
    config: DecoderConfig, layout: Layout, requests: Sequence[tuple[np.ndarray, int]], batch_tokens: int
) -> list[tuple[int, list[int]]]:
    """The batches, longest first: padded length, and the indices of the requests in it."""
    buckets = bucket_lengths(config.max_positions)
    lengths = np.array([len(whole) - 1 for whole, _ in requests], np.int64)
    padded = np.array(buckets)[np.searchsorted(buckets, lengths)]
    order = np.argsort(-lengths, kind="stable")
    plan = []
    for length in reversed(buckets):
        members = order[padded[order] == length].tolist()
        rows = batch_rows(layout, length, batch_tokens)
        plan += [(length, members[start : start + rows]) for start in range(0, len(members), rows)]
    return plan


def _with_progress(plan: list[tuple[int, list[int]]]) -> Iterable[tuple[int, list[int]]]:
    """The batches, behind a progress bar on process 0 of a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(
        plan, "scoring", console=console, transient=True, disable=not console.is_terminal or jax.process_index() != 0
    )


def _padded_batch(
    layout: Layout, requests: Sequence[tuple[np.ndarray, int]], members: list[int], rows: int, length: int
) -> _Batch:
    tokens = np.zeros((rows, length), np.int32)
    slots = np.full((layout.data, _slots(layout, rows, length)), -1, np.int32)
    targets = np.zeros_like(slots)
    rows_each = rows // layout.data
    filled = [0] * layout.data
    for row, index in enumerate(members):
        whole, count = requests[index]
        device, own_row = divmod(row, rows_each)
        tokens[row, : len(whole) - 1] = whole[:-1]
        first = own_row * length + len(whole) - 1 - count
        here = slice(filled[device], filled[device] + count)
        slots[device, here] = np.arange(first, first + count)
        targets[device, here] = whole[-count:]
        filled[device] += count
    return _Batch(members, tokens, slots, targets, [requests[index][1] for index in members])


def _split(batch: _Batch, logprobs: np.ndarray, greedy: np.ndarray) -> Iterator[TokenScores]:
    """Cut the results of a batch into those of its members, which lie one after the other on each device."""
    used = batch.slots >= 0
    ends = np.cumsum(batch.counts)[:-1]
    for scores, best in zip(np.split(logprobs[used], ends), np.split(greedy[used], ends), strict=True):
        yield TokenScores(scores, best)


def _chunk_size(slots: int) -> int:
    return min(CHUNK, slots)


def _slots(layout: Layout, rows: int, length: int) -> int:
    """P: enough places for every position of a device's rows, in whole chunks."""
    positions = rows // layout.data * length
    size = _chunk_size(positions)
    return -(-positions // size) * size


def logprobs_and_argmax(
    logits: Float[Array, "S C V"], targets: Int[Array, "S C"]
) -> tuple[Float[Array, "S C"], Int[Array, "S C"]]:
    """Log-softmax at the targets, and the argmax.

    Written with reductions over V alone, which may be sharded, where gathers and `argmax` would move the logits.
    """
    ids = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[-1]), 2)
    best = jnp.max(logits, axis=-1)
    target_logits = jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)
    log_sum = jnp.log(jnp.sum(jnp.exp(logits - best[..., None]), axis=-1))
    argmax = jnp.min(jnp.where(logits == best[..., None], ids, logits.shape[-1]), axis=-1)
    return target_logits - best - log_sum, argmax
