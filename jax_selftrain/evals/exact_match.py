"""Exact match and suffix probabilities of known sequences from one teacher-forced pass.

Exact match needs no decoding: the greedy continuation is the suffix iff every teacher-forced argmax of the suffix is
the true token. The same logits give log p_z under every sampling policy. Only suffix positions are projected to the
vocabulary, one position at a time. All batches have one shape, so a result does not depend on other sequences. For the
measures of the greedy continuation, sequences without exact match are decoded.

**Near-verbatim measures.** Extraction strength (Wang et al., arXiv:2406.09179, after Carlini et al., arXiv:2012.07805)
is the share of the suffix that greedy decoding completes: 1 − k/n for the smallest k so that prefix and k true tokens
give the other n − k. They do so iff the last n − k teacher-forced argmaxes are the true tokens. With a wrong last token
it is 0; OpenUnlearning returns 1/n there. Edit distance and longest common subsequence compare the greedy continuation
with the suffix by token ids.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Int
from rapidfuzz.distance import LCSseq, Levenshtein

from jax_selftrain import hub
from jax_selftrain.distributed.mesh import mesh_context
from jax_selftrain.distributed.sharding import ShardingRules, shard_host_array
from jax_selftrain.likelihood.device_programs import logprob_moments, logprobs_and_argmax
from jax_selftrain.likelihood.engine import TokenScores, check_finite
from jax_selftrain.likelihood.resumable import PartialResults, compute_units
from jax_selftrain.models import DecoderConfig, Params, forward, unembed
from jax_selftrain.sampling import SamplingParams, generate, warp_logits

MAX_BATCH_ROWS = 512
"""Maximum batch size of a device: at V = 50k the fp32 logits of one position take 100 MB."""
BATCHES_PER_UNIT = 4
"""Number of batches in a work unit."""
APPROXIMATE_MATCH = 0.1
"""Largest edit distance of an approximate match, as a share of the suffix."""


def extraction_metrics(
    model: hub.LoadedModel,
    sequences: np.ndarray,
    prefix: int,
    *,
    policies: Mapping[str, SamplingParams] = MappingProxyType({}),
    batch_tokens: int = 8192,
    greedy_decode: bool = True,
    token_scores: bool = False,
    parts: PartialResults | None = None,
) -> dict[str, np.ndarray]:
    """Measure extraction of N sequences by a model in memory.

    Args:
      model: from `hub.load_model`.
      sequences: integer [N, prefix + suffix].
      prefix: number of given tokens, at least one.
      policies: sampling policies for log p_z by name, in addition to temperature 1.
      batch_tokens: token positions in one device batch.
      greedy_decode: compute the measures of the greedy continuation, which are most of the work.
      token_scores: also return the scores of each suffix token.
      parts: keeps finished units of a few batches.

    Returns:
      Arrays [N]: `exact_match` (bool), `matched_tokens` (length of the longest common prefix of suffix and greedy
      continuation), `teacher_forced_accuracy` (share of the suffix tokens that are the argmax given the true previous
      tokens), `extraction_strength` (length of the last run of these, as a share of the suffix), `logprob` (log p_z at
      temperature 1, nats), and `logprob NAME`, log p_z under each policy; −inf if p_z = 0.
      With `greedy_decode`, `token_accuracy` (share of the suffix tokens that the greedy continuation has at the same
      position), `edit_distance` (Levenshtein distance of the greedy continuation to the suffix, as a share of the
      suffix), `approximate_match` (bool: at most `APPROXIMATE_MATCH`) and `longest_common_subsequence` (as a share of
      the suffix).
      With `token_scores`, `token_NAME`, the fields of `TokenScores` as arrays [N, suffix].

    Raises:
      InputError: a log-probability is not a number, or a file of `parts` is damaged.
    """
    rules, suffixes = model.sharding_rules, np.asarray(sequences)[:, prefix:]
    per_device = min(MAX_BATCH_ROWS, max(1, batch_tokens // (sequences.shape[1] * rules.data_parallelism)))
    rows = per_device * rules.data_parallelism
    if parts is not None:
        options = {"policies": dict(policies), "batch_tokens": batch_tokens, "greedy_decode": greedy_decode}
        options |= {"token_scores": True} if token_scores else {}
        return _measure_units(model, sequences, options | {"prefix": prefix}, BATCHES_PER_UNIT * rows, parts)
    static = (model.config, rules, model.compute_dtype, prefix, tuple(policies.values()))
    greedy = np.empty(suffixes.shape, np.int32)
    moments = [np.empty(suffixes.shape, np.float32) for _ in range(2 * token_scores)]
    logprobs = np.empty((len(suffixes), 1 + len(policies), suffixes.shape[1]), np.float32)
    with mesh_context(rules.mesh):
        for first in range(0, len(sequences), rows):
            batch = np.zeros((rows, sequences.shape[1]), np.int32)
            members = sequences[first : first + rows]
            batch[: len(members)] = members
            arguments = model.params, shard_host_array(rules, batch, ("batch", None))
            scores = suffix_scores_program(*static, *arguments, **({"moments": True} if token_scores else {}))
            for array, part in zip((logprobs, greedy, *moments), jax.device_get(scores), strict=True):
                array[first : first + rows] = part[: len(members)]
    sums = logprobs.sum(axis=2, dtype=np.float64)
    check_finite(sums[:, 0], (f"sequence {i}" for i in range(len(sums))))
    for name, values in zip(policies, sums.T[1:], strict=True):
        # A policy may exclude a token of the suffix.
        check_finite(np.where(np.isneginf(values), 0, values), (f"sequence {i} under {name}" for i in range(len(sums))))
    hits = greedy == suffixes
    exact = hits.all(axis=1)
    matched = np.where(exact, suffixes.shape[1], np.argmin(hits, axis=1)).astype(np.int32)
    measured = {"exact_match": exact, "matched_tokens": matched}
    if greedy_decode:
        decoded = suffixes.copy()  # with exact match, the greedy continuation is the suffix
        sampling_params = SamplingParams(max_tokens=suffixes.shape[1], temperature=0)
        prompts = sequences[~exact, :prefix].tolist()
        generated = generate(model, prompts, sampling_params, batch_size=rows // rules.data_parallelism)
        decoded[~exact] = np.reshape(generated, (-1, suffixes.shape[1]))
        measured["token_accuracy"] = (decoded == suffixes).mean(axis=1)
        measured |= _compare_sequences(decoded, suffixes)
    strength = np.minimum.accumulate(hits[:, ::-1], axis=1).mean(axis=1)
    measured |= {"teacher_forced_accuracy": hits.mean(axis=1), "extraction_strength": strength, "logprob": sums[:, 0]}
    measured |= {f"logprob {name}": values for name, values in zip(policies, sums.T[1:], strict=True)}
    if token_scores:
        mean, std = moments
        scores = TokenScores(logprobs[:, 0], mean, std, greedy)._asdict()
        measured |= {f"token_{name}": array for name, array in scores.items()}
    return measured


def _compare_sequences(decoded: np.ndarray, suffixes: np.ndarray) -> dict[str, np.ndarray]:
    """Compare continuations [N, suffix] with suffixes, by token ids."""
    pairs = list(zip(decoded.tolist(), suffixes.tolist(), strict=True))
    distance = np.array([Levenshtein.normalized_distance(*pair) for pair in pairs], np.float64)
    return {
        "edit_distance": distance,
        "approximate_match": distance <= APPROXIMATE_MATCH,
        "longest_common_subsequence": np.array([LCSseq.normalized_similarity(*pair) for pair in pairs], np.float64),
    }


def _measure_units(
    model: hub.LoadedModel, sequences: np.ndarray, options: dict[str, Any], size: int, parts: PartialResults
) -> dict[str, np.ndarray]:
    """Measure extraction in units of `size` sequences."""
    units = [range(first, min(first + size, len(sequences))) for first in range(0, len(sequences), size)]
    tokens = hashlib.sha256(np.ascontiguousarray(sequences, np.int64).tobytes()).hexdigest()

    def compute(indices: Iterable[int]) -> Iterator[tuple[int, pa.Table]]:
        for i in indices:
            measured = extraction_metrics(model, sequences[units[i]], **options)
            yield i, pa.table({name: _to_arrow(array) for name, array in measured.items()})

    inputs = {"sequences": tokens, "shape": list(sequences.shape), "options": repr(options)}
    table = compute_units(model, parts, inputs, units, compute).drop_columns("item")
    return {name: _to_numpy(table[name]) for name in table.column_names}


def _to_arrow(array: np.ndarray) -> pa.Array:
    values = pa.array(array.reshape(-1))
    return values if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(values, array.shape[1])


def _to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    if not pa.types.is_fixed_size_list(column.type):
        return column.to_numpy()
    return pc.list_flatten(column).to_numpy().reshape(-1, column.type.list_size)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), static_argnames="moments")
def suffix_scores_program(
    config: DecoderConfig,
    rules: ShardingRules,
    compute_dtype: DTypeLike,
    prefix: int,
    policies: tuple[SamplingParams, ...],
    params: Params,
    tokens: Int[Array, "B T"],
    moments: bool = False,
) -> tuple[Array, ...]:
    """Compute log-probabilities of suffix tokens under each policy, and the argmax.

    Args:
      config, rules, compute_dtype, prefix, policies, moments: static.
      params: of the model.
      tokens: sequences of prefix and suffix, sharded on the batch.

    Returns:
      Log-probabilities [B, P, Q] at Q suffix positions, nats, fp32, at temperature 1 and under each policy (P = 1 +
      policies); the most probable token (the lowest id of equal ones), [B, Q]; with `moments` also the two arrays
      [B, Q] of `logprob_moments`. Replicated.
    """
    hidden = forward(config, rules, params, tokens[:, :-1], compute_dtype=compute_dtype)
    suffix = jnp.moveaxis(hidden[:, prefix - 1 :], 1, 0), jnp.moveaxis(tokens[:, prefix:], 1, 0)

    def score_position(_: None, inputs: tuple[Array, Array]) -> tuple[None, tuple[Array, ...]]:
        rows, target = inputs
        logits = unembed(config, rules, params, rows, compute_dtype=compute_dtype)
        views = [logits, *(warp_logits(logits, sampling_params) for sampling_params in policies)]
        scores = [logprobs_and_argmax(view[:, None], target[:, None, None]) for view in views]
        own = scores[0][1:]
        if moments:
            own += logprob_moments(logits[:, None])
        return None, (
            jnp.concatenate([logprobs[:, 0] for logprobs, _ in scores], axis=1),
            *(array[:, 0] for array in own),
        )

    _, (logprobs, *own) = jax.lax.scan(score_position, None, suffix)
    replicated = PartitionSpec()
    return tuple(jax.reshard(array, replicated) for array in (jnp.moveaxis(logprobs, 0, 2), *(one.T for one in own)))
