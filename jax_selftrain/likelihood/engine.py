"""Likelihood engine: log p(continuation | context) of many token sequences.

It saves work in five ways. (1) Prefixes that requests share are computed once (`likelihood.prefix_trie`). (2) Most of
the first layer is precomputed for each unique token (`models.token_precompute`). (3) The last layer and the vocabulary
projection are computed at query positions only, so no `[B, T, V]` exists. (4) Short requests are packed into rows of a
few lengths, so few programs are compiled. (5) A unit is dispatched before the results of the last one are awaited.

The same requests, batch size and mesh give the same bits, in any order of the requests. Otherwise packing differs, and
results are equal up to fp32 rounding. Inputs longer than the model are truncated on the left, as in
`HFLM._loglikelihood_tokens` of lm-eval 0.4.13: input = (context + continuation)[-(max_positions + 1):][:-1].
"""

from __future__ import annotations

import math
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
    """Token ids of a context and its continuation, both non-empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class TokenScores(NamedTuple):
    """Scores of the n tokens of a continuation."""

    logprobs: np.ndarray
    """[n] float32: log-probability of each token given all previous tokens, nats."""
    greedy: np.ndarray
    """[n] int32: most probable token at each position (the lowest id of equal ones)."""


class Likelihood(NamedTuple):
    """Score of a continuation."""

    loglikelihood: float
    """Nats; fp32 terms added in fp64."""
    is_greedy: bool
    """True if every token is the most probable one at its position."""
    tokens: int
    """Length of the continuation."""


Requests = Sequence[LoglikelihoodRequest | tuple[Sequence[int], Sequence[int]]]


class _ScoreBuffer(NamedTuple):
    """Results of a unit on the devices."""

    logprobs: jax.Array
    """[X, N, M]."""
    greedy: jax.Array
    """[X, N]."""
    row_slots: list[np.ndarray]
    """For each batch, (device, first slot) of each row: [rows, 2]."""


def loglikelihoods(model: hub.LoadedModel, requests: Requests, *, batch_tokens: int | None = None) -> list[Likelihood]:
    """Compute the log-likelihood of each continuation given its context.

    Args:
      model: from `hub.load_model`.
      requests: pairs of token ids (context, continuation), both non-empty.
      batch_tokens: token positions in one device batch, over the whole mesh; None: 512 per replica on a CPU, 8192
        elsewhere.

    Returns:
      One `Likelihood` per request, in their order. The caller must check for NaN.

    Raises:
      InputError: a request is empty, has ids outside the vocabulary, or a continuation longer than the model.
    """
    unique, index = deduplicate(model.config, requests)
    scores = _score_unique(model, unique, batch_tokens)
    likelihoods = [sum_token_scores(*pair) for pair in zip(unique, scores, strict=True)]
    return [likelihoods[i] for i in index]


def token_scores(model: hub.LoadedModel, requests: Requests, *, batch_tokens: int | None = None) -> list[TokenScores]:
    """Compute the scores of each token; see `loglikelihoods`."""
    unique, index = deduplicate(model.config, requests)
    scores = _score_unique(model, unique, batch_tokens)
    return [scores[i] for i in index]


def sum_token_scores(request: TokenizedRequest, scores: TokenScores) -> Likelihood:
    """Sum the scores of a request's tokens."""
    return Likelihood(
        float(np.sum(scores.logprobs, dtype=np.float64)),
        bool(np.array_equal(scores.greedy, request.tokens[-request.num_targets :])),
        request.num_targets,
    )


def check_finite(likelihoods: Iterable[Likelihood], labels: Iterable[str]) -> None:
    """Refuse a log-likelihood that is not finite.

    Raises:
      InputError: names the request by its label.
    """
    for likelihood, label in zip(likelihoods, labels, strict=True):
        if not math.isfinite(likelihood.loglikelihood):
            raise InputError(
                f"the log-likelihood of {label} is {likelihood.loglikelihood}: the model's weights are damaged or "
                "overflow in this --dtype; check them, or try float32"
            )


def deduplicate(config: DecoderConfig, requests: Requests) -> tuple[list[TokenizedRequest], list[int]]:
    """Return the distinct requests, sorted, and the index of each request.

    Raises:
      InputError: a request cannot be scored; names it by number.
    """
    tokenized = [_validate(config, i, *request) for i, request in enumerate(requests)]
    keys = [request.sort_key for request in tokenized]
    by_key = dict(zip(keys, tokenized, strict=True))
    order = sorted(by_key)
    index = {key: i for i, key in enumerate(order)}
    return [by_key[key] for key in order], [index[key] for key in keys]


def _score_unique(
    model: hub.LoadedModel, requests: Sequence[TokenizedRequest], batch_tokens: int | None
) -> list[TokenScores]:
    units = plan_units(model.sharding_rules, model.config, requests, batch_tokens)
    results: dict[int, TokenScores] = {}
    for _, scores in run_batches(model, with_progress(units), batch_tokens):
        results |= scores
    return [results[i] for i in range(len(requests))]


def run_batches(
    model: hub.LoadedModel, units: Iterable[WorkUnit], batch_tokens: int | None
) -> Iterator[tuple[WorkUnit, dict[int, TokenScores]]]:
    """Score units; dispatch the next before yielding the last.

    Args:
      model: all processes of its mesh must call this with the same units.
      units: some of those from `plan_units`.
      batch_tokens: the value that the units were planned with.

    Yields:
      A unit, and the scores of its requests by request id.
    """
    rules, config = model.sharding_rules, model.config
    shape = (rules.data_parallelism, buffer_size(rules, config.max_positions, batch_tokens), config.hidden_size)
    running: tuple[WorkUnit, _ScoreBuffer] | None = None
    precomputed: Precomputed | None = None
    with mesh_context(rules.mesh):
        buffer = jnp.zeros(shape, jnp.float32, out_sharding=rules.sharding(("batch", None, None)))
    for unit in units:
        with mesh_context(rules.mesh):
            precomputed = _precompute(model, precomputed, unit)
            buffer, results = _dispatch(model, buffer, precomputed, unit, batch_tokens)
        if running is not None:
            yield running[0], _gather_scores(*running)
        running = unit, results
    if running is not None:
        yield running[0], _gather_scores(*running)


def batch_program(
    config: DecoderConfig, rules: ShardingRules, dtype: DTypeLike, batch_tokens: int | None, length: int
) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
    """Return the program of a batch in the worst case.

    All tokens are different, and all positions are query positions.

    Returns:
      Function, abstract arguments with shardings, indices of donated arguments.
    """
    rows, slots = batch_rows(rules, length, batch_tokens), buffer_size(rules, config.max_positions, batch_tokens)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_params(config, dtype),
        param_shardings(config, rules),
    )
    num_unique = min(config.vocab_size, rows // rules.data_parallelism * length)
    capacity = unique_token_capacity(config.vocab_size, num_unique)

    def array(*shape: int, dtype: DTypeLike = jnp.int32) -> jax.ShapeDtypeStruct:
        axes = ("batch", *[None] * (len(shape) - 1)) if shape else ()
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rules.sharding(axes))

    with mesh_context(rules.mesh):
        precomputed = abstract_precomputed(config, rules, params, capacity, dtype)
    devices = rules.data_parallelism
    buffer = array(devices, slots, config.hidden_size, dtype=jnp.float32)
    batch = [*[array(rows, length)] * 4, array(devices, slots)]
    unit = (array(devices, capacity), array(devices, slots, MAX_TARGETS), array())
    return partial(score_batch, config, rules, dtype), (params, buffer, precomputed, *batch, *unit), ()


def scoring_program(config: ScoreConfig, mesh: Mesh) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
    """Return the largest program of scoring; see `batch_program`.

    It encodes a batch of the longest rows and projects the buffer; scoring compiles the two separately. Only the
    model's config is read.
    """
    decoder = hub.open_model(config.model).config
    rules = make_sharding_rules(config.preset, mesh, axis_sizes(decoder))
    return batch_program(decoder, rules, jnp.dtype(config.dtype), config.batch_tokens, decoder.max_positions)


class _Programs(NamedTuple):
    """Compiled functions of `device_programs`."""

    precompute: Callable[..., Precomputed]
    encode: Callable[..., jax.Array]
    score: Callable[..., tuple[jax.Array, jax.Array]]


@cache
def _programs() -> _Programs:
    def jit(function: Callable[..., Any], donated: tuple[int, ...]) -> Callable[..., Any]:
        return jax.jit(function, static_argnums=(0, 1, 2), donate_argnums=donated, compiler_options=xla_options())

    return _Programs(jit(precompute_tokens, (4,)), jit(encode_batch, (4,)), jit(score_buffer, ()))


def _precompute(model: hub.LoadedModel, precomputed: Precomputed | None, unit: WorkUnit) -> Precomputed:
    """Precompute the unique tokens of a unit, in the memory of `precomputed`.

    Memory of another size is not reused: programs would then depend on earlier units, and differ after a restart.
    """
    rules, config, dtype = model.sharding_rules, model.config, model.compute_dtype
    most = max(map(len, unit.unique_tokens))
    capacity = unique_token_capacity(config.vocab_size, most)
    if precomputed is None or precomputed.x.shape[1] != capacity:
        shapes = abstract_precomputed(config, rules, model.params, capacity, dtype)
        precomputed = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, out_sharding=leaf.sharding), shapes)
    tokens = np.zeros((rules.data_parallelism, precomputed.x.shape[1]), np.int32)
    for row, unique in zip(tokens, unit.unique_tokens, strict=True):
        row[: len(unique)] = unique
    num_chunks = shard_host_array(rules, np.asarray(-(-most // PROJECTION_CHUNK), np.int32), ())
    unique_tokens = shard_host_array(rules, tokens, ("batch", None))
    return _programs().precompute(config, rules, dtype, model.params, precomputed, unique_tokens, num_chunks)


def _dispatch(
    model: hub.LoadedModel, buffer: jax.Array, precomputed: Precomputed, unit: WorkUnit, batch_tokens: int | None
) -> tuple[jax.Array, _ScoreBuffer]:
    """Dispatch a unit to the devices without waiting for them."""
    rules, static = model.sharding_rules, (model.config, model.sharding_rules, model.compute_dtype)
    programs = _programs()
    targets = np.zeros((*buffer.shape[:2], MAX_TARGETS), np.int32)
    filled, row_slots = [0] * rules.data_parallelism, []
    for batch in unit.batches:
        rows = batch_rows(rules, batch.length, batch_tokens)
        arrays, slots = _batch_arrays(rules, batch, rows, unit.unique_tokens, targets, filled)
        row_slots.append(slots)
        arguments = (shard_host_array(rules, array, ("batch", None)) for array in arrays)
        buffer = programs.encode(*static, model.params, buffer, precomputed, *arguments)
    wanted = shard_host_array(rules, targets, ("batch", None, None))
    num_chunks = shard_host_array(rules, np.asarray(-(-max(filled) // PROJECTION_CHUNK), np.int32), ())
    return buffer, _ScoreBuffer(*programs.score(*static, model.params, buffer, wanted, num_chunks), row_slots)


def _batch_arrays(
    rules: ShardingRules,
    batch: BatchSpec,
    rows: int,
    unique_tokens: Sequence[np.ndarray],
    targets: np.ndarray,
    filled: list[int],
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Return the arguments of `encode_batch`, and (device, first slot) of each row.

    Writes the targets of the batch to `targets`, and advances the number of `filled` slots of each device.
    """
    tokens, positions, ends = (np.zeros((rows, batch.length), np.int32) for _ in range(3))
    query_positions = np.zeros((rows, batch.num_queries), np.int32)
    query_index = np.full(targets.shape[:2], -1, np.int32)
    row_slots = np.zeros((len(batch.rows), 2), np.int64)
    for i, row in enumerate(batch.rows):
        device, local = divmod(i, rows // rules.data_parallelism)
        n, begin, count = len(row.tokens), filled[device], len(row.query_positions)
        tokens[i, :n] = np.searchsorted(unique_tokens[device], row.tokens)
        positions[i, :n], ends[i, :n] = row.positions, row.subtree_ends
        query_positions[i, :count] = row.query_positions
        query_index[device, begin : begin + count] = local * batch.num_queries + np.arange(count)
        targets[device, begin : begin + count] = row.targets
        row_slots[i] = device, begin
        filled[device] = begin + count
    return (tokens, positions, ends, query_positions, query_index), row_slots


def _gather_scores(unit: WorkUnit, buffer: _ScoreBuffer) -> dict[int, TokenScores]:
    """Wait for a unit, and gather the scores of each request."""
    logprobs, greedy = np.asarray(buffer.logprobs), np.asarray(buffer.greedy)
    scores = {}
    for batch, row_slots in zip(unit.batches, buffer.row_slots, strict=True):
        for row, (device, begin) in zip(batch.rows, row_slots, strict=True):
            for request_id, index in zip(row.request_ids, row.target_index, strict=True):
                slots, columns = begin + index[:, 0], index[:, 1]
                scores[request_id] = TokenScores(logprobs[device, slots, columns], greedy[device, slots])
    return scores


def _validate(
    config: DecoderConfig, index: int, context: Sequence[int], continuation: Sequence[int]
) -> TokenizedRequest:
    if not len(context) or not len(continuation):
        raise InputError(f"request {index}: context and continuation must each have at least one token")
    tokens = np.concatenate([np.asarray(context, np.int64), np.asarray(continuation, np.int64)])
    if len(continuation) > config.max_positions:
        raise InputError(
            f"request {index}: a continuation of {len(continuation)} tokens is longer than the model's "
            f"{config.max_positions} positions; cut it"
        )
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise InputError(
            f"request {index}: token id {tokens.max() if tokens.min() >= 0 else tokens.min()} is not in the model's "
            f"vocabulary of {config.vocab_size}; is the tokenizer this model's own?"
        )
    return TokenizedRequest(tokens[-(config.max_positions + 1) :].astype(np.int32), len(continuation))


def with_progress(units: Sequence[WorkUnit]) -> Iterable[WorkUnit]:
    """Iterate over units with a progress bar on process 0."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    is_hidden = not console.is_terminal or jax.process_index() != 0
    return track(units, "scoring", console=console, transient=True, disable=is_hidden)
