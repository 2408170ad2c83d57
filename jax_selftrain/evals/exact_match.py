"""Exact match and suffix probabilities of known sequences from one teacher-forced pass.

Exact match needs no decoding: the greedy continuation is the suffix iff every teacher-forced argmax of the suffix is
the true token. The same logits give log p_z under every sampling policy. Only suffix positions are projected to the
vocabulary, one position at a time. All batches have one shape, so a result does not depend on other sequences. For
`token_accuracy`, sequences without exact match are decoded greedily.
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
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_selftrain import hub
from jax_selftrain.distributed.mesh import mesh_context
from jax_selftrain.distributed.sharding import ShardingRules, shard_host_array
from jax_selftrain.likelihood.device_programs import logprobs_and_argmax
from jax_selftrain.likelihood.engine import check_finite
from jax_selftrain.likelihood.resumable import PartialResults, compute_units
from jax_selftrain.models import DecoderConfig, Params, forward, unembed
from jax_selftrain.sampling import SamplingParams, generate, warp_logits

MAX_BATCH_ROWS = 512
"""Maximum batch size of a device: at V = 50k the fp32 logits of one position take 100 MB."""
BATCHES_PER_UNIT = 4
"""Number of batches in a work unit."""


def extraction_metrics(
    model: hub.LoadedModel,
    sequences: np.ndarray,
    prefix: int,
    *,
    policies: Mapping[str, SamplingParams] = MappingProxyType({}),
    batch_tokens: int = 8192,
    greedy_decode: bool = True,
    parts: PartialResults | None = None,
) -> dict[str, np.ndarray]:
    """Measure extraction of N sequences by a model in memory.

    Args:
      model: from `hub.load_model`.
      sequences: integer [N, prefix + suffix].
      prefix: number of given tokens, at least one.
      policies: sampling policies for log p_z by name, in addition to temperature 1.
      batch_tokens: token positions in one device batch.
      greedy_decode: compute `token_accuracy`, which is most of the work.
      parts: keeps finished units of a few batches.

    Returns:
      Arrays [N]: `exact_match` (bool), `matched_tokens` (length of the longest common prefix of suffix and greedy
      continuation), `token_accuracy` (share of the suffix tokens that the greedy continuation has at the same
      position), `teacher_forced_accuracy` (the same given the true previous tokens), `logprob` (log p_z at temperature
      1, nats), and `logprob NAME`, log p_z under each policy; −inf if p_z = 0.

    Raises:
      InputError: a log-probability is not a number, or a file of `parts` is damaged.
    """
    rules, suffixes = model.sharding_rules, np.asarray(sequences)[:, prefix:]
    per_device = min(MAX_BATCH_ROWS, max(1, batch_tokens // (sequences.shape[1] * rules.data_parallelism)))
    rows = per_device * rules.data_parallelism
    if parts is not None:
        options = {"policies": dict(policies), "batch_tokens": batch_tokens, "greedy_decode": greedy_decode}
        return _measure_units(model, sequences, options | {"prefix": prefix}, BATCHES_PER_UNIT * rows, parts)
    static = (model.config, rules, model.compute_dtype, prefix, tuple(policies.values()))
    greedy = np.empty(suffixes.shape, np.int32)
    logprobs = np.empty((len(suffixes), 1 + len(policies), suffixes.shape[1]), np.float32)
    with mesh_context(rules.mesh):
        for first in range(0, len(sequences), rows):
            batch = np.zeros((rows, sequences.shape[1]), np.int32)
            members = sequences[first : first + rows]
            batch[: len(members)] = members
            scores = suffix_scores_program(*static, model.params, shard_host_array(rules, batch, ("batch", None)))
            for array, part in zip((logprobs, greedy), jax.device_get(scores), strict=True):
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
    measured |= {"teacher_forced_accuracy": hits.mean(axis=1), "logprob": sums[:, 0]}
    return measured | {f"logprob {name}": values for name, values in zip(policies, sums.T[1:], strict=True)}


def _measure_units(
    model: hub.LoadedModel, sequences: np.ndarray, options: dict[str, Any], size: int, parts: PartialResults
) -> dict[str, np.ndarray]:
    """Measure extraction in units of `size` sequences."""
    units = [range(first, min(first + size, len(sequences))) for first in range(0, len(sequences), size)]
    tokens = hashlib.sha256(np.ascontiguousarray(sequences, np.int64).tobytes()).hexdigest()

    def compute(indices: Iterable[int]) -> Iterator[tuple[int, pa.Table]]:
        for i in indices:
            yield i, pa.table(extraction_metrics(model, sequences[units[i]], **options))

    inputs = {"sequences": tokens, "shape": list(sequences.shape), "options": repr(options)}
    table = compute_units(model, parts, inputs, units, compute).drop_columns("item")
    return {name: table[name].to_numpy() for name in table.column_names}


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def suffix_scores_program(
    config: DecoderConfig,
    rules: ShardingRules,
    compute_dtype: DTypeLike,
    prefix: int,
    policies: tuple[SamplingParams, ...],
    params: Params,
    tokens: Int[Array, "B T"],
) -> tuple[Float[Array, "B P Q"], Int[Array, "B Q"]]:
    """Compute log-probabilities of suffix tokens under each policy, and the argmax.

    Args:
      config, rules, compute_dtype, prefix, policies: static.
      params: of the model.
      tokens: sequences of prefix and suffix, sharded on the batch.

    Returns:
      Log-probabilities at Q suffix positions, nats, fp32, at temperature 1 and under each policy (P = 1 + policies);
      the most probable token (the lowest id of equal ones). Replicated.
    """
    hidden = forward(config, rules, params, tokens[:, :-1], compute_dtype=compute_dtype)
    suffix = jnp.moveaxis(hidden[:, prefix - 1 :], 1, 0), jnp.moveaxis(tokens[:, prefix:], 1, 0)

    def score_position(_: None, inputs: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        rows, target = inputs
        logits = unembed(config, rules, params, rows, compute_dtype=compute_dtype)
        views = [logits, *(warp_logits(logits, sampling_params) for sampling_params in policies)]
        scores = [logprobs_and_argmax(view[:, None], target[:, None, None]) for view in views]
        return None, (jnp.concatenate([logprobs[:, 0] for logprobs, _ in scores], axis=1), scores[0][1][:, 0])

    _, (logprobs, greedy) = jax.lax.scan(score_position, None, suffix)
    replicated = PartitionSpec()
    return jax.reshard(jnp.moveaxis(logprobs, 0, 2), replicated), jax.reshard(greedy.T, replicated)
