"""Likelihood engine: log p(continuation | context) of many token sequences.

It saves work in five ways. (1) Prefixes that requests share are computed once (`likelihood.prefix_trie`). (2) Most of
the first layer is precomputed for each unique token (`models.token_precompute`). (3) The last layer and the vocabulary
projection are computed at query positions only, so no `[B, T, V]` exists. (4) Short requests are packed into rows of a
few lengths, so few programs are compiled. (5) A unit is dispatched before the results of the last one are awaited.

The same requests, batch size and mesh give the same bits, in any order of the requests. Otherwise packing differs, and
results are equal up to fp32 rounding. Inputs longer than the model are truncated on the left, as in
`HFLM._loglikelihood_tokens` of lm-eval 0.4.13: input = (context + continuation)[-(max_positions + 1):][:-1].
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jax_selftrain import hub
from jax_selftrain.config import ScoreConfig
from jax_selftrain.distributed.mesh import mesh_context, xla_options
from jax_selftrain.distributed.progress import progress_bar
from jax_selftrain.distributed.sharding import ShardingRules, make_sharding_rules, shard_host_array
from jax_selftrain.errors import InputError
from jax_selftrain.likelihood.batching import (
    PROJECTION_CHUNK,
    BatchSpec,
    WorkUnit,
    batch_rows,
    buffer_size,
    unique_token_capacity,
)
from jax_selftrain.likelihood.device_programs import encode_batch, score_buffer
from jax_selftrain.likelihood.prefix_trie import MAX_TARGETS, PackedTrie, TokenizedRequest
from jax_selftrain.models import DecoderConfig, Params, abstract_params, axis_sizes
from jax_selftrain.models.layers import PreAttention
from jax_selftrain.models.token_precompute import abstract_precomputed, precompute


class LoglikelihoodRequest(NamedTuple):
    """Token ids of a context and its continuation, both non-empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class Likelihood(NamedTuple):
    """Score of a continuation."""

    loglikelihood: float
    """Nats; fp32 terms added in fp64."""
    is_greedy: bool
    """True if every token is the most probable one (the lowest id of equal ones) at its position."""
    tokens: int
    """Length of the continuation."""


class TokenScores(NamedTuple):
    """Scores of each of the n tokens of a continuation."""

    logprobs: np.ndarray
    """[n] float32, nats."""
    is_greedy: np.ndarray
    """[n] bool: True if the token is the most probable one at its position."""

    def sum(self) -> Likelihood:
        """Return the score of the whole continuation."""
        total = float(np.sum(self.logprobs, dtype=np.float64))
        return Likelihood(total, bool(self.is_greedy.all()), len(self.logprobs))


Unit = TypeVar("Unit")
Requests = Sequence[LoglikelihoodRequest | tuple[Sequence[int], Sequence[int]]]
LoglikelihoodFn = Callable[[Sequence[LoglikelihoodRequest]], list[Likelihood]]
"""Function that scores requests, in their order."""


def check_finite(loglikelihoods: Iterable[float], labels: Iterable[str]) -> None:
    """Refuse a log-likelihood that is not finite.

    Raises:
      InputError: names the request by its label.
    """
    for value, label in zip(loglikelihoods, labels, strict=True):
        if not math.isfinite(value):
            raise InputError(
                f"the log-likelihood of {label} is {value}: the model's weights are damaged or overflow in this "
                "--dtype; check them, or try float32"
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
    running: tuple[WorkUnit, tuple[jax.Array, jax.Array]] | None = None
    precomputed: PreAttention | None = None
    with mesh_context(rules.mesh):
        buffer = jnp.zeros(shape, jnp.float32, out_sharding=rules.sharding(("batch", None, None)))
    for unit in units:
        with mesh_context(rules.mesh):
            precomputed = _precompute(model, precomputed, unit)
            buffer, scores = _dispatch(model, buffer, precomputed, unit)
        if running is not None:
            yield running[0], _gather_scores(*running)
        running = unit, scores
    if running is not None:
        yield running[0], _gather_scores(*running)


def scoring_program(config: ScoreConfig, mesh: Mesh) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
    """Return the largest program of scoring.

    It runs a unit of one batch of the longest rows; all tokens are different, and all positions are query positions.
    Scoring compiles its three parts separately. Only the model's config is read.

    Returns:
      Function, abstract arguments with shardings, indices of donated arguments.
    """
    decoder, dtype = hub.open_model(config.model).config, jnp.dtype(config.dtype)
    rules, length = make_sharding_rules(config.preset, mesh, axis_sizes(decoder)), decoder.max_positions
    devices, rows = rules.data_parallelism, batch_rows(rules, length, config.batch_tokens)
    slots = buffer_size(rules, length, config.batch_tokens)
    capacity = unique_token_capacity(decoder.vocab_size, min(decoder.vocab_size, rows // devices * length))

    def array(*shape: int, dtype: DTypeLike = jnp.int32) -> jax.ShapeDtypeStruct:
        axes = ("batch", *[None] * (len(shape) - 1)) if shape else ()
        return rules.abstract_array(shape, dtype, axes)

    def score_batch(
        params: Params, buffer: jax.Array, table: PreAttention, *arrays: jax.Array
    ) -> tuple[jax.Array, ...]:
        *batch, unique_tokens, targets, num_chunks = arrays
        unique = (unique_tokens, num_chunks, PROJECTION_CHUNK)
        table = precompute(decoder, rules, params, table, *unique, compute_dtype=dtype)
        buffer = encode_batch(decoder, rules, dtype, params, buffer, table, *batch)
        return score_buffer(decoder, rules, dtype, params, buffer, targets, num_chunks)

    params = abstract_params(decoder, dtype, rules)
    with mesh_context(mesh):
        precomputed = abstract_precomputed(decoder, rules, params, capacity, dtype)
    buffer = array(devices, slots, decoder.hidden_size, dtype=jnp.float32)
    batch = [*[array(rows, length)] * 4, array(devices, slots)]
    unit = (array(devices, capacity), array(devices, slots, MAX_TARGETS), array())
    return score_batch, (params, buffer, precomputed, *batch, *unit), ()


@cache
def _jit(function: Callable[..., Any], donated: str | None = None) -> Callable[..., Any]:
    """Compile a device program, and reuse the memory of one argument."""
    static = ("config", "rules", "compute_dtype") + (("chunk_size",) if function is precompute else ())
    return jax.jit(function, static_argnames=static, donate_argnames=donated, compiler_options=xla_options())


def _precompute(model: hub.LoadedModel, precomputed: PreAttention | None, unit: WorkUnit) -> PreAttention:
    """Precompute the unique tokens of a unit, in the memory of `precomputed`.

    Memory of another size is not reused: programs would then depend on earlier units, and differ after a restart.
    """
    rules, config, dtype = model.sharding_rules, model.config, model.compute_dtype
    most = max(map(len, unit.unique_tokens))
    capacity = unique_token_capacity(config.vocab_size, most)
    if precomputed is None or precomputed.x.shape[1] != capacity:
        shapes = abstract_precomputed(config, rules, model.params, capacity, dtype)
        precomputed = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, out_sharding=leaf.sharding), shapes)
    tokens = np.zeros((rules.data_parallelism, capacity), np.int32)
    for row, unique in zip(tokens, unit.unique_tokens, strict=True):
        row[: len(unique)] = unique
    arguments = shard_host_array(rules, tokens, ("batch", None)), _num_chunks(rules, most), PROJECTION_CHUNK
    return _jit(precompute, "table")(config, rules, model.params, precomputed, *arguments, compute_dtype=dtype)


def _num_chunks(rules: ShardingRules, count: int) -> jax.Array:
    return shard_host_array(rules, np.asarray(-(-count // PROJECTION_CHUNK), np.int32), ())


def _dispatch(
    model: hub.LoadedModel, buffer: jax.Array, precomputed: PreAttention, unit: WorkUnit
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Dispatch a unit to the devices without waiting for them.

    Returns:
      The buffer, and the log-probabilities [X, N, M] and most probable tokens [X, N] of its slots.
    """
    rules, static = model.sharding_rules, (model.config, model.sharding_rules, model.compute_dtype)
    targets = np.zeros((*buffer.shape[:2], MAX_TARGETS), np.int32)
    filled = [0] * rules.data_parallelism
    for batch in unit.batches:
        arrays = _batch_arrays(batch, unit.unique_tokens, targets, filled)
        arguments = (shard_host_array(rules, array, ("batch", None)) for array in arrays)
        buffer = _jit(encode_batch, "buffer")(*static, model.params, buffer, precomputed, *arguments)
    wanted = shard_host_array(rules, targets, ("batch", None, None))
    return buffer, _jit(score_buffer)(*static, model.params, buffer, wanted, _num_chunks(rules, max(filled)))


def _batch_arrays(
    batch: BatchSpec, unique_tokens: Sequence[np.ndarray], targets: np.ndarray, filled: list[int]
) -> tuple[np.ndarray, ...]:
    """Return the arrays of `encode_batch`, and fill in `targets`."""
    rows = batch.rows_per_device * len(filled)
    tokens, positions, ends = (np.zeros((rows, batch.length), np.int32) for _ in range(3))
    query_positions = np.zeros((rows, batch.num_queries), np.int32)
    query_index = np.full(targets.shape[:2], -1, np.int32)
    for i, (row, device, begin) in enumerate(_row_slots(batch, filled)):
        n, count = len(row.tokens), len(row.query_positions)
        tokens[i, :n] = np.searchsorted(unique_tokens[device], row.tokens)
        positions[i, :n], ends[i, :n] = row.positions, row.subtree_ends
        query_positions[i, :count] = row.query_positions
        first = i % batch.rows_per_device * batch.num_queries
        query_index[device, begin : begin + count] = first + np.arange(count)
        targets[device, begin : begin + count] = row.targets
    return tokens, positions, ends, query_positions, query_index


def _row_slots(batch: BatchSpec, filled: list[int]) -> Iterator[tuple[PackedTrie, int, int]]:
    """Yield each row, its device and first buffer slot; advance `filled`."""
    for i, row in enumerate(batch.rows):
        device = i // batch.rows_per_device
        yield row, device, filled[device]
        filled[device] += len(row.query_positions)


def _gather_scores(unit: WorkUnit, scores: tuple[jax.Array, jax.Array]) -> dict[int, TokenScores]:
    """Wait for the scores of a unit, and divide them by request."""
    logprobs, greedy = map(np.asarray, scores)
    filled, found = [0] * len(logprobs), {}
    for batch in unit.batches:
        for row, device, begin in _row_slots(batch, filled):
            for request_id, index in zip(row.request_ids, row.target_index, strict=True):
                query, column = index.T
                is_greedy = greedy[device, begin + query] == row.targets[query, column]
                found[request_id] = TokenScores(logprobs[device, begin + query, column], is_greedy)
    return found


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


def with_progress(units: Sequence[Unit]) -> Iterator[Unit]:
    """Iterate over units with a progress bar on process 0."""
    with progress_bar("scoring", len(units)) as show:
        for done, unit in enumerate(units):
            show(done, "")
            yield unit
