"""The likelihood engine: log p(continuation | context) of many token sequences at once.

Five things make it cheap. (1) What requests have in common is computed once: choices share the context of their
question, and identical requests are one (see `scoring.trees`). (2) What depends on a token alone, most of the first
layer, is computed once for each different token (see `models.known`). (3) Only the positions that predict something
asked for go through the last layer's queries and MLP, and only they are projected to the vocabulary: each device
gathers their hidden states in a pool, whatever batch they come from, and a full pool goes through the output matrix in
chunks, so that no `[B, T, V]` ever exists. (4) Rows are padded to one of a few lengths, each with a fixed number of
rows, and short requests stand side by side in one row: a few programs serve any task. (5) The device has the next unit
to work on before the results of the last are awaited.

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
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jax_selftrain import hub
from jax_selftrain.config import ScoreConfig
from jax_selftrain.distributed.mesh import mesh_context, xla_options
from jax_selftrain.distributed.sharding import ShardingRules, make_sharding_rules, shard_host_array
from jax_selftrain.errors import InputError
from jax_selftrain.likelihood.batching import (
    PROJECTION_CHUNK,
    BatchSpec,
    WorkUnit,
    batch_rows,
    buffer_size,
    plan_units,
    unique_token_capacity,
)
from jax_selftrain.likelihood.device_programs import encode_batch, precompute_tokens, score_batch, score_buffer
from jax_selftrain.likelihood.prefix_trie import MAX_TARGETS, TokenizedRequest
from jax_selftrain.models import (
    DecoderConfig,
    Precomputed,
    abstract_params,
    abstract_precomputed,
    axis_sizes,
    param_shardings,
)


class LoglikelihoodRequest(NamedTuple):
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


Requests = Sequence[LoglikelihoodRequest | tuple[Sequence[int], Sequence[int]]]


class _ScoreBuffer(NamedTuple):
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
    distinct, which = deduplicate(model.config, requests)
    answers = [
        sum_token_scores(asked, scores)
        for asked, scores in zip(distinct, _scores(model, distinct, batch_tokens), strict=True)
    ]
    return [answers[index] for index in which]


def token_scores(model: hub.LoadedModel, requests: Requests, *, batch_tokens: int | None = None) -> list[TokenScores]:
    """As `loglikelihoods`, but token by token."""
    distinct, which = deduplicate(model.config, requests)
    scores = _scores(model, distinct, batch_tokens)
    return [scores[index] for index in which]


def sum_token_scores(asked: TokenizedRequest, scores: TokenScores) -> Likelihood:
    """The answer to a request from those to its tokens."""
    return Likelihood(
        float(np.sum(scores.logprobs, dtype=np.float64)),
        bool(np.array_equal(scores.greedy, asked.tokens[-asked.num_targets :])),
        asked.num_targets,
    )


def deduplicate(config: DecoderConfig, requests: Requests) -> tuple[list[TokenizedRequest], list[int]]:
    """The different ones among requests, and which of them each request is.

    Raises:
      InputError: a request cannot be answered; names it by number.
    """
    found: dict[tuple[bytes, int], int] = {}
    distinct: list[TokenizedRequest] = []
    which: list[int] = []
    for index, (context, continuation) in enumerate(requests):
        request = _checked(config, index, context, continuation)
        number = found.setdefault(request.key, len(distinct))
        if number == len(distinct):
            distinct.append(request)
        which.append(number)
    return distinct, which


def _scores(
    model: hub.LoadedModel, distinct: Sequence[TokenizedRequest], batch_tokens: int | None
) -> list[TokenScores]:
    units = plan_units(model.sharding_rules, model.config, distinct, batch_tokens)
    results: dict[int, TokenScores] = {}
    for _, scores in run_batches(model, with_progress(units), batch_tokens):
        results |= scores
    return [results[index] for index in range(len(distinct))]


def run_batches(
    model: hub.LoadedModel, units: Iterable[WorkUnit], batch_tokens: int | None
) -> Iterator[tuple[WorkUnit, dict[int, TokenScores]]]:
    """Score units one after the other; each is asked for before the last one's results are handed over.

    Args:
      model: all processes that its mesh spans must come here with the same units.
      units: from `plan`, any of them.
      batch_tokens: as they were planned with.

    Yields:
      A unit, and the scores of the requests in it by their index.
    """
    rules, config = model.sharding_rules, model.config
    shape = (rules.data_parallelism, buffer_size(rules, config.max_positions, batch_tokens), config.hidden_size)
    running: tuple[WorkUnit, _ScoreBuffer] | None = None
    known: Precomputed | None = None
    with mesh_context(rules.mesh):
        pool = jnp.zeros(shape, jnp.float32, out_sharding=rules.sharding(("batch", None, None)))
    for unit in units:
        with mesh_context(rules.mesh):
            known = _precompute(model, known, unit)
            pool, results = _dispatch(model, pool, known, unit, batch_tokens)
        if running is not None:
            yield running[0], _gather_scores(*running)
        running = unit, results
    if running is not None:
        yield running[0], _gather_scores(*running)


def batch_program(
    config: DecoderConfig, rules: ShardingRules, dtype: DTypeLike, batch_tokens: int | None, length: int
) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
    """The computation for rows of one length, whose tokens are as different as can be, that are asked about at every
    position: function, abstract arguments with shardings, donated arguments."""
    rows, places = batch_rows(rules, length, batch_tokens), buffer_size(rules, config.max_positions, batch_tokens)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_params(config, dtype),
        param_shardings(config, rules),
    )
    tokens = unique_token_capacity(config.vocab_size, min(config.vocab_size, rows // rules.data_parallelism * length))

    def array(*shape: int, dtype: DTypeLike = jnp.int32) -> jax.ShapeDtypeStruct:
        axes = ("batch", *[None] * (len(shape) - 1)) if shape else ()
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rules.sharding(axes))

    with mesh_context(rules.mesh):
        known = abstract_precomputed(config, rules, params, tokens, dtype)
    pool = array(rules.data_parallelism, places, config.hidden_size, dtype=jnp.float32)
    batch = [*[array(rows, length)] * 4, array(rules.data_parallelism, places)]
    asked = (array(rules.data_parallelism, tokens), array(rules.data_parallelism, places, MAX_TARGETS), array())
    return partial(score_batch, config, rules, dtype), (params, pool, known, *batch, *asked), ()


def abstract_program(config: ScoreConfig, mesh: Mesh) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
    """The stage's largest computation: a batch of the longest rows, and the pool that it fills.

    The stage runs the two one after the other, compiled apart. Reads the model's config, not its weights.
    """
    decoder, _ = hub.read_config(config.model)
    rules = make_sharding_rules(config.preset, mesh, axis_sizes(decoder))
    return batch_program(decoder, rules, jnp.dtype(config.dtype), config.batch_tokens, decoder.max_positions)


class _Programs(NamedTuple):
    """The functions of `scoring.pool`, compiled."""

    learn: Callable[..., Precomputed]
    fill: Callable[..., jax.Array]
    score: Callable[..., tuple[jax.Array, jax.Array]]


@cache
def _programs() -> _Programs:
    def compiled(function: Callable[..., Any], donated: tuple[int, ...]) -> Callable[..., Any]:
        return jax.jit(function, static_argnums=(0, 1, 2), donate_argnums=donated, compiler_options=xla_options())

    return _Programs(compiled(precompute_tokens, (4,)), compiled(encode_batch, (4,)), compiled(score_buffer, ()))


def _precompute(model: hub.LoadedModel, known: Precomputed | None, unit: WorkUnit) -> Precomputed:
    """What is known of a unit's tokens, in the memory of what was known before where the unit alone would take as much.

    (Else its programs would depend on what was scored before it, and not on what a restart finds missing.)
    """
    rules, config, dtype = model.sharding_rules, model.config, model.compute_dtype
    most = max(map(len, unit.unique_tokens))
    places = unique_token_capacity(config.vocab_size, most)
    if known is None or known.x.shape[1] != places:
        shapes = abstract_precomputed(config, rules, model.params, places, dtype)
        known = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, out_sharding=leaf.sharding), shapes)
    tokens = np.zeros((rules.data_parallelism, known.x.shape[1]), np.int32)
    for mine, vocabulary in zip(tokens, unit.unique_tokens, strict=True):
        mine[: len(vocabulary)] = vocabulary
    chunks = shard_host_array(rules, np.asarray(-(-most // PROJECTION_CHUNK), np.int32), ())
    return _programs().learn(
        config, rules, dtype, model.params, known, shard_host_array(rules, tokens, ("batch", None)), chunks
    )


def _dispatch(
    model: hub.LoadedModel, pool: jax.Array, known: Precomputed, unit: WorkUnit, batch_tokens: int | None
) -> tuple[jax.Array, _ScoreBuffer]:
    """Hand a unit to the devices without waiting for them."""
    rules, static = model.sharding_rules, (model.config, model.sharding_rules, model.compute_dtype)
    programs = _programs()
    targets = np.zeros((*pool.shape[:2], MAX_TARGETS), np.int32)
    filled, first = [0] * rules.data_parallelism, []
    for batch in unit.batches:
        rows = batch_rows(rules, batch.length, batch_tokens)
        arrays, places = _arrays(rules, batch, rows, unit.unique_tokens, targets, filled)
        first.append(places)
        arguments = (shard_host_array(rules, array, ("batch", None)) for array in arrays)
        pool = programs.fill(*static, model.params, pool, known, *arguments)
    wanted = shard_host_array(rules, targets, ("batch", None, None))
    chunks = shard_host_array(rules, np.asarray(-(-max(filled) // PROJECTION_CHUNK), np.int32), ())
    return pool, _ScoreBuffer(*programs.score(*static, model.params, pool, wanted, chunks), first)


def _arrays(
    rules: ShardingRules,
    batch: BatchSpec,
    rows: int,
    vocabularies: Sequence[np.ndarray],
    targets: np.ndarray,
    filled: list[int],
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """The arguments of `fill_pool` for a batch, and where in the pool each row's places begin.

    What is asked for goes into `targets`, and `filled` is moved on.
    """
    tokens, positions, ends = (np.zeros((rows, batch.length), np.int32) for _ in range(3))
    at = np.zeros((rows, batch.num_queries), np.int32)
    slots = np.full(targets.shape[:2], -1, np.int32)
    places = np.zeros((len(batch.rows), 2), np.int64)
    for number, row in enumerate(batch.rows):
        device, own = divmod(number, rows // rules.data_parallelism)
        n, begin, count = len(row.tokens), filled[device], len(row.query_positions)
        tokens[number, :n] = np.searchsorted(vocabularies[device], row.tokens)
        positions[number, :n], ends[number, :n] = row.positions, row.subtree_ends
        at[number, :count] = row.query_positions
        slots[device, begin : begin + count] = own * batch.num_queries + np.arange(count)
        targets[device, begin : begin + count] = row.targets
        places[number] = device, begin
        filled[device] = begin + count
    return (tokens, positions, ends, at, slots), places


def _gather_scores(unit: WorkUnit, pool: _ScoreBuffer) -> dict[int, TokenScores]:
    """Wait for a unit, and give each request its part of the pool."""
    logprobs, greedy = np.asarray(pool.logprobs), np.asarray(pool.greedy)
    found = {}
    for batch, places in zip(unit.batches, pool.first, strict=True):
        for row, (device, begin) in zip(batch.rows, places, strict=True):
            for member, at in zip(row.request_ids, row.target_index, strict=True):
                here, target = begin + at[:, 0], at[:, 1]
                found[member] = TokenScores(logprobs[device, here, target], greedy[device, here])
    return found


def _checked(
    config: DecoderConfig, index: int, context: Sequence[int], continuation: Sequence[int]
) -> TokenizedRequest:
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
    return TokenizedRequest(whole[-(config.max_positions + 1) :].astype(np.int32), len(continuation))


def with_progress(units: Sequence[WorkUnit]) -> Iterable[WorkUnit]:
    """The units, behind a progress bar on process 0 of a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(
        units, "scoring", console=console, transient=True, disable=not console.is_terminal or jax.process_index() != 0
    )
