"""The likelihood engine: log p(continuation | context) of many token sequences at once.

Four things make it cheap. (1) What requests have in common is computed once: choices share the context of their
question, and identical requests are one (see `scoring.trees`). (2) Only the positions that predict something asked for
go through the last layer's queries and MLP, and only they are projected to the vocabulary: each device gathers their
hidden states in a pool, whatever batch they come from, and a full pool goes through the output matrix in chunks, so
that no `[B, T, V]` ever exists. (3) Rows are padded to one of a few lengths, each with a fixed number of rows, and
short requests stand side by side in one row: a few programs serve any task. (4) The device has the next unit to work
on before the results of the last are awaited.

Padding stands to the right of the text, where under the causal mask no real position can see it. The same requests,
batch size and mesh give the same bits, in whatever order they are asked. Which other requests are scored with one
decides where it stands in a row, and so in which order sums over positions are rounded; so do batch size and mesh.
All these are the same numbers up to fp32 rounding.

Inputs longer than the model lose tokens on the left, as in lm-evaluation-harness 0.4.13
(`HFLM._loglikelihood_tokens`): input = (context + continuation)[-(max_positions + 1):][:-1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
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
from jax_selftrain.mesh import Layout, compiler_options, make_layout, place
from jax_selftrain.models import (
    DecoderConfig,
    Params,
    abstract_params,
    axis_sizes,
    forward,
    param_shardings,
    project,
)
from jax_selftrain.scoring.trees import CHUNK, TARGETS, Asked, Batch, Unit, batch_rows, plan, pool_places


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


Requests = Sequence[Request | tuple[Sequence[int], Sequence[int]]]


class _Pool(NamedTuple):
    """What a unit leaves on the devices."""

    logprobs: jax.Array
    """[S, N, TARGETS]."""
    greedy: jax.Array
    """[S, N]."""
    first: list[np.ndarray]
    """Per batch, the place of each of its rows: [rows, 2] (device, first place there)."""


def loglikelihoods(model: hub.LoadedModel, requests: Requests, *, batch_tokens: int | None = None) -> list[Likelihood]:
    """Log-likelihood of each continuation given its context.

    Args:
      model: from `hub.load_model`.
      requests: pairs of token ids (context, continuation), both non-empty.
      batch_tokens: token positions in one device batch, over the whole mesh; None: 512 per replica on a CPU, 8192
        elsewhere.

    Returns:
      One `Likelihood` per request, in their order. NaN log-likelihoods are passed on, for the caller to name.

    Raises:
      InputError: a request is empty, has ids outside the vocabulary, or a continuation longer than the model.
    """
    distinct, which = distinct_requests(model.config, requests)
    answers = [
        summed(asked, scores) for asked, scores in zip(distinct, _scores(model, distinct, batch_tokens), strict=True)
    ]
    return [answers[index] for index in which]


def token_scores(model: hub.LoadedModel, requests: Requests, *, batch_tokens: int | None = None) -> list[TokenScores]:
    """As `loglikelihoods`, but token by token."""
    distinct, which = distinct_requests(model.config, requests)
    scores = _scores(model, distinct, batch_tokens)
    return [scores[index] for index in which]


def summed(asked: Asked, scores: TokenScores) -> Likelihood:
    """The answer to a request from those to its tokens."""
    return Likelihood(
        float(np.sum(scores.logprobs, dtype=np.float64)),
        bool(np.array_equal(scores.greedy, asked.tokens[-asked.count :])),
        asked.count,
    )


def distinct_requests(config: DecoderConfig, requests: Requests) -> tuple[list[Asked], list[int]]:
    """The different ones among requests, and which of them each request is.

    Raises:
      InputError: a request cannot be answered; names it by number.
    """
    found: dict[tuple[bytes, int], int] = {}
    distinct: list[Asked] = []
    which: list[int] = []
    for index, request in enumerate(requests):
        asked = _checked(config, index, *request)
        number = found.setdefault(asked.key, len(distinct))
        if number == len(distinct):
            distinct.append(asked)
        which.append(number)
    return distinct, which


def _scores(model: hub.LoadedModel, distinct: Sequence[Asked], batch_tokens: int | None) -> list[TokenScores]:
    units = plan(model.layout, distinct, model.config.max_positions, model.config.hidden_size, batch_tokens)
    results: dict[int, TokenScores] = {}
    for _, scores in run_units(model, with_progress(units), batch_tokens):
        results |= scores
    return [results[index] for index in range(len(distinct))]


def run_units(
    model: hub.LoadedModel, units: Iterable[Unit], batch_tokens: int | None
) -> Iterator[tuple[Unit, dict[int, TokenScores]]]:
    """Score units one after the other; each is asked for before the last one's results are handed over.

    Args:
      model: all processes that its mesh spans must come here with the same units.
      units: from `plan`, any of them.
      batch_tokens: as they were planned with.

    Yields:
      A unit, and the scores of the requests in it by their index.
    """
    layout, config = model.layout, model.config
    shape = (layout.data, pool_places(layout, config.max_positions, batch_tokens), config.hidden_size)
    running: tuple[Unit, _Pool] | None = None
    with jax.set_mesh(layout.mesh):
        pool = jnp.zeros(shape, jnp.float32, out_sharding=layout.sharding(("batch", None, None)))
    for unit in units:
        with jax.set_mesh(layout.mesh):
            pool, results = _dispatch(model, pool, unit, batch_tokens)
        if running is not None:
            yield running[0], _answers(*running)
        running = unit, results
    if running is not None:
        yield running[0], _answers(*running)


def fill_pool(
    config: DecoderConfig,
    layout: Layout,
    compute_dtype: DTypeLike,
    params: Params,
    pool: Float[Array, "S N D"],
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    branches: Int[Array, "B T"],
    at: Int[Array, "B Q"],
    slots: Int[Array, "S N"],
) -> Float[Array, "S N D"]:
    """Compute one padded batch; S devices along `data` hold B/S rows each.

    Args:
      config, layout, compute_dtype: static.
      params: the model.
      pool: hidden states so far, N places on each device.
      tokens: rows, padded on the right.
      positions, segments, branches: see `models.forward`.
      at: the positions of each row that the last layer computes.
      slots: for each place of the pool, which of those B/S·Q positions of the same device goes there; −1: none.

    Returns:
      The pool with the hidden states of this batch.
    """
    hidden = forward(
        config,
        layout,
        params,
        tokens,
        positions=positions,
        segments=segments,
        branches=branches,
        at=at,
        compute_dtype=compute_dtype,
    )
    hidden = jnp.reshape(hidden, (layout.data, -1, hidden.shape[-1]), out_sharding=pool_sharding(layout))
    data = PartitionSpec("data")

    # A gather across all rows would move hidden states between devices; each device needs only its own.
    @partial(jax.shard_map, in_specs=(data, data, data), out_specs=data)
    def put(rows: Array, at: Array, before: Array) -> Array:
        taken = jnp.take_along_axis(rows, jnp.maximum(at, 0)[..., None], axis=1)
        return jnp.where((at >= 0)[..., None], taken.astype(before.dtype), before)

    return put(hidden, slots, pool)


def score_pool(
    config: DecoderConfig,
    layout: Layout,
    compute_dtype: DTypeLike,
    params: Params,
    pool: Float[Array, "S N D"],
    targets: Int[Array, "S N M"],
    chunks: Int[Array, ""],
) -> tuple[Float[Array, "S N M"], Int[Array, "S N"]]:
    """Project a pool to the vocabulary.

    Args:
      config, layout, compute_dtype: static.
      params: the model.
      pool: from `fill_pool`.
      targets: tokens asked for at each place.
      chunks: how many chunks of `CHUNK` places are in use on the fullest device.

    Returns:
      Log-probability of each target (nats, fp32) and the most probable token at each place, whole on every device.
    """
    replicated = PartitionSpec()

    def score_chunk(i: Array, done: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, wanted = (jax.lax.dynamic_slice_in_dim(array, i * CHUNK, CHUNK, axis=1) for array in (pool, targets))
        new = logprobs_and_argmax(layout, project(config, layout, params, hidden, compute_dtype=compute_dtype), wanted)
        logprobs, greedy = (
            jax.lax.dynamic_update_slice_in_dim(old, part, i * CHUNK, axis=1)
            for old, part in zip(done, new, strict=True)
        )
        return logprobs, greedy

    nothing = (jnp.zeros_like(targets, jnp.float32), jnp.zeros_like(targets[..., 0]))
    logprobs, greedy = jax.lax.fori_loop(0, chunks, score_chunk, nothing)
    return jax.reshard(logprobs, replicated), jax.reshard(greedy, replicated)


def logprobs_and_argmax(
    layout: Layout, logits: Float[Array, "S C V"], targets: Int[Array, "S C M"]
) -> tuple[Float[Array, "S C M"], Int[Array, "S C"]]:
    """Log-softmax at the targets, and the argmax (the lowest id among equals).

    Each device works on the logits that it holds; of a vocabulary that lies on several, they exchange only what they
    found. (Written as masked sums over V this took three times as long on a CPU.)
    """
    vocab = layout.spec(("vocab",))[0]
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
    layout: Layout,
    compute_dtype: DTypeLike,
    params: Params,
    pool: Float[Array, "S N D"],
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    branches: Int[Array, "B T"],
    at: Int[Array, "B Q"],
    slots: Int[Array, "S N"],
    targets: Int[Array, "S N M"],
    chunks: Int[Array, ""],
) -> tuple[Float[Array, "S N M"], Int[Array, "S N"]]:
    """`fill_pool`, then `score_pool`: a unit of one batch in one program."""
    pool = fill_pool(config, layout, compute_dtype, params, pool, tokens, positions, segments, branches, at, slots)
    return score_pool(config, layout, compute_dtype, params, pool, targets, chunks)


def batch_program(
    config: DecoderConfig, layout: Layout, dtype: DTypeLike, batch_tokens: int | None, length: int
) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
    """The computation for rows of one length that are asked about at every position: function, abstract arguments with
    shardings, donated arguments."""
    rows, places = batch_rows(layout, length, batch_tokens), pool_places(layout, config.max_positions, batch_tokens)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_params(config, dtype),
        param_shardings(config, layout),
    )
    shapes: list[tuple[tuple[int, ...], Any]] = [
        ((layout.data, places, config.hidden_size), jnp.float32),
        *[((rows, length), jnp.int32)] * 5,
        ((layout.data, places), jnp.int32),
        ((layout.data, places, TARGETS), jnp.int32),
    ]
    arrays = [
        jax.ShapeDtypeStruct(shape, kind, sharding=layout.sharding(("batch", *[None] * (len(shape) - 1))))
        for shape, kind in shapes
    ]
    chunks = jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.sharding(()))
    return partial(score_batch, config, layout, dtype), (params, *arrays, chunks), ()


def program(config: ScoreConfig, mesh: Mesh) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
    """The stage's largest computation: a batch of the longest rows, and the pool that it fills.

    The stage runs the two one after the other, compiled apart. Reads the model's config, not its weights.
    """
    decoder, _ = hub.read_config(config.model)
    layout = make_layout(config.preset, mesh, axis_sizes(decoder))
    return batch_program(decoder, layout, jnp.dtype(config.dtype), config.batch_tokens, decoder.max_positions)


def pool_sharding(layout: Layout) -> jax.sharding.NamedSharding:
    """Of hidden states [S, N, D]."""
    return layout.sharding(("batch", None, None))


@cache
def _compiled() -> tuple[Callable[..., jax.Array], Callable[..., tuple[jax.Array, jax.Array]]]:
    def compiled(function: Callable[..., Any], donated: tuple[int, ...]) -> Callable[..., Any]:
        return jax.jit(function, static_argnums=(0, 1, 2), donate_argnums=donated, compiler_options=compiler_options())

    return compiled(fill_pool, (4,)), compiled(score_pool, ())


def _dispatch(model: hub.LoadedModel, pool: jax.Array, unit: Unit, batch_tokens: int | None) -> tuple[jax.Array, _Pool]:
    """Hand a unit to the devices without waiting for them."""
    layout, static = model.layout, (model.config, model.layout, model.compute_dtype)
    fill, score = _compiled()
    targets = np.zeros((*pool.shape[:2], TARGETS), np.int32)
    filled, first = [0] * layout.data, []
    for batch in unit.batches:
        arrays, places = _arrays(layout, batch, batch_rows(layout, batch.length, batch_tokens), targets, filled)
        first.append(places)
        pool = fill(*static, model.params, pool, *(place(layout, array, ("batch", None)) for array in arrays))
    wanted = place(layout, targets, ("batch", None, None))
    chunks = place(layout, np.asarray(-(-max(filled) // CHUNK), np.int32), ())
    return pool, _Pool(*score(*static, model.params, pool, wanted, chunks), first)


def _arrays(
    layout: Layout, batch: Batch, rows: int, targets: np.ndarray, filled: list[int]
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """The arguments of `fill_pool` for a batch, and where in the pool each row's places begin.

    What is asked for goes into `targets`, and `filled` is moved on.
    """
    tokens, positions, segments, branches = (np.zeros((rows, batch.length), np.int32) for _ in range(4))
    at = np.zeros((rows, batch.asked), np.int32)
    slots = np.full(targets.shape[:2], -1, np.int32)
    places = np.zeros((len(batch.rows), 2), np.int64)
    for number, row in enumerate(batch.rows):
        device, own = divmod(number, rows // layout.data)
        n, begin, count = len(row.tokens), filled[device], len(row.slots)
        for array, values in zip(
            (tokens, positions, segments, branches),
            (row.tokens, row.positions, row.segments, row.branches),
            strict=True,
        ):
            array[number, :n] = values
        at[number, :count] = row.slots
        slots[device, begin : begin + count] = own * batch.asked + np.arange(count)
        targets[device, begin : begin + count] = row.targets
        places[number] = device, begin
        filled[device] = begin + count
    return (tokens, positions, segments, branches, at, slots), places


def _answers(unit: Unit, pool: _Pool) -> dict[int, TokenScores]:
    """Wait for a unit, and give each request its part of the pool."""
    logprobs, greedy = np.asarray(pool.logprobs), np.asarray(pool.greedy)
    found = {}
    for batch, places in zip(unit.batches, pool.first, strict=True):
        for row, (device, begin) in zip(batch.rows, places, strict=True):
            for member, at in zip(row.members, row.answers, strict=True):
                here, target = begin + at[:, 0], at[:, 1]
                found[member] = TokenScores(logprobs[device, here, target], greedy[device, here])
    return found


def _checked(config: DecoderConfig, index: int, context: Sequence[int], continuation: Sequence[int]) -> Asked:
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
    return Asked(whole[-(config.max_positions + 1) :].astype(np.int32), len(continuation))


def with_progress(units: Sequence[Unit]) -> Iterable[Unit]:
    """The units, behind a progress bar on process 0 of a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(
        units, "scoring", console=console, transient=True, disable=not console.is_terminal or jax.process_index() != 0
    )
