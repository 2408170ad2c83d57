"""Exact match and suffix probabilities of known sequences from one teacher-forced pass.

Exact match needs no decoding: the greedy continuation is the suffix iff every teacher-forced argmax of the suffix is
the true token. The same logits give log p_z under every sampling policy. Only suffix positions are projected to the
vocabulary, one position at a time. All batches have one shape, so a result does not depend on other sequences. For
`token_accuracy`, sequences without exact match are decoded greedily.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_selftrain import hub
from jax_selftrain.distributed.mesh import mesh_context
from jax_selftrain.distributed.sharding import ShardingRules, shard_host_array
from jax_selftrain.errors import InputError
from jax_selftrain.evals.suffix_probability import NamedSamplingParams, column_name
from jax_selftrain.models import DecoderConfig, Params, forward, unembed
from jax_selftrain.sampling import SamplingParams, generate, warp_logits

MAX_BATCH_ROWS = 512
"""Maximum batch size of a device: at V = 50k the fp32 logits of one position take 100 MB."""


def extraction_metrics(
    model: hub.LoadedModel,
    sequences: np.ndarray,
    prefix: int,
    *,
    policies: Sequence[NamedSamplingParams] = (),
    batch_tokens: int = 8192,
    greedy_decode: bool = True,
) -> dict[str, np.ndarray]:
    """Measure extraction of N sequences by a model in memory.

    Args:
      model: from `hub.load_model`.
      sequences: integer [N, prefix + suffix].
      prefix: number of given tokens, at least one.
      policies: sampling policies for log p_z, in addition to temperature 1.
      batch_tokens: token positions in one device batch.
      greedy_decode: compute `token_accuracy`, which is most of the work.

    Returns:
      Arrays [N]: `exact_match` (bool), `matched_tokens` (length of the longest common prefix of suffix and greedy
      continuation), `token_accuracy` (share of the suffix tokens that the greedy continuation has at the same
      position), `teacher_forced_accuracy` (the same given the true previous tokens), `logprob` (log p_z at temperature
      1, nats), and log p_z under each policy by its `column_name`; −inf if p_z = 0.

    Raises:
      InputError: a log-probability is not a number.
    """
    forced = score_suffixes(model, sequences, prefix, policies=policies, batch_tokens=batch_tokens)
    if not greedy_decode:
        return forced
    exact, suffixes = forced["exact_match"], sequences[:, prefix:]
    decoded = suffixes.copy()  # with exact match, the greedy continuation is the suffix
    rows = (
        extraction_batch_size(model.sharding_rules, sequences.shape[1], batch_tokens)
        // model.sharding_rules.data_parallelism
    )
    greedy = SamplingParams(max_tokens=suffixes.shape[1], temperature=0)
    generated = generate(model, sequences[~exact, :prefix].tolist(), greedy, batch_size=rows)
    decoded[~exact] = np.reshape(generated, (-1, suffixes.shape[1]))
    return {
        "exact_match": exact,
        "matched_tokens": forced.pop("matched_tokens"),
        "token_accuracy": (decoded == suffixes).mean(axis=1),
        **forced,
    }


def score_suffixes(
    model: hub.LoadedModel,
    sequences: np.ndarray,
    prefix: int,
    *,
    policies: Sequence[NamedSamplingParams] = (),
    batch_tokens: int = 8192,
) -> dict[str, np.ndarray]:
    """Compute all metrics of `extraction_metrics` except `token_accuracy`."""
    suffixes = np.asarray(sequences)[:, prefix:]
    rows = extraction_batch_size(model.sharding_rules, sequences.shape[1], batch_tokens)
    sampling_params = tuple(named.sampling_params for named in policies)
    greedy = np.empty(suffixes.shape, np.int32)
    logprobs = np.empty((len(suffixes), 1 + len(sampling_params), suffixes.shape[1]), np.float32)
    with mesh_context(model.sharding_rules.mesh):
        for first in range(0, len(sequences), rows):
            batch = np.zeros((rows, sequences.shape[1]), np.int32)
            members = sequences[first : first + rows]
            batch[: len(members)] = members
            tokens = shard_host_array(model.sharding_rules, batch, ("batch", None))
            scores = suffix_scores_program(
                model.config, model.sharding_rules, model.compute_dtype, prefix, sampling_params, model.params, tokens
            )
            for array, part in zip((logprobs, greedy), jax.device_get(scores), strict=True):
                array[first : first + rows] = part[: len(members)]
    hits = greedy == suffixes
    sums = logprobs.sum(axis=2, dtype=np.float64)
    _check(sums, [named.name for named in policies])
    exact = hits.all(axis=1)
    return {
        "exact_match": exact,
        "matched_tokens": np.where(exact, suffixes.shape[1], np.argmin(hits, axis=1)),
        "teacher_forced_accuracy": hits.mean(axis=1),
        "logprob": sums[:, 0],
        **{column_name(named): sums[:, 1 + i] for i, named in enumerate(policies)},
    }


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
        ids = jax.lax.broadcasted_iota(jnp.int32, (1, logits.shape[-1]), 1)
        best = jnp.max(logits, axis=-1, keepdims=True)
        # Reductions over V work on its shards; a gather or `argmax` would move the logits.
        greedy = jnp.min(jnp.where(logits == best, ids, logits.shape[-1]), axis=-1)
        views = [logits, *(warp_logits(logits, sampling_params) for sampling_params in policies)]
        return None, (jnp.stack([_log_prob(view, ids == target[:, None]) for view in views], axis=1), greedy)

    _, (logprobs, greedy) = jax.lax.scan(score_position, None, suffix)
    replicated = PartitionSpec()
    return jax.reshard(jnp.moveaxis(logprobs, 0, 2), replicated), jax.reshard(greedy.T, replicated)


def kept_lost_gained(before: np.ndarray, after: np.ndarray) -> dict[str, int]:
    """Count the transitions of boolean outcomes [N]."""
    before, after = _check_paired(before, after)
    return {
        "kept": int((before & after).sum()),
        "lost": int((before & ~after).sum()),
        "gained": int((~before & after).sum()),
        "never": int((~before & ~after).sum()),
    }


def flip_rate(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> float:
    """Return the share of sequences whose exact match differs.

    Between two measurements of one model (an A/A repeat with another batch size, mesh or dtype) it is the noise floor
    of any comparison.

    Args:
      first, second: from `extraction_metrics` or `score_suffixes`, of the same sequences.
    """
    before, after = _check_paired(first["exact_match"], second["exact_match"])
    return float((before != after).mean())


def _log_prob(logits: Float[Array, "B V"], target: Array) -> Float[Array, " B"]:
    """Compute log-softmax at the target of each row (bool [B, V])."""
    best = jnp.max(logits, axis=-1, keepdims=True)
    log_sum = jnp.log(jnp.sum(jnp.exp(logits - best), axis=-1))
    return jnp.sum(jnp.where(target, logits - best, 0.0), axis=-1) - log_sum


def extraction_batch_size(rules: ShardingRules, length: int, batch_tokens: int) -> int:
    """Return the global batch size for sequences of a length."""
    return min(MAX_BATCH_ROWS, max(1, batch_tokens // (length * rules.data_parallelism))) * rules.data_parallelism


def _check(sums: np.ndarray, names: Sequence[str]) -> None:
    wrong = np.isnan(sums)
    wrong[:, 0] |= np.isinf(sums[:, 0])
    if not wrong.any():
        return
    row, policy = np.argwhere(wrong)[0].tolist()
    under = f" under {names[policy - 1]}" if policy else ""
    raise InputError(
        f"the log-probability of sequence {row}{under} is {sums[row, policy]}: the model's weights are damaged or "
        "overflow in this --dtype; check them, or try float32"
    )


def _check_paired(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    before, after = np.asarray(before, bool), np.asarray(after, bool)
    if before.shape != after.shape or not before.size:
        raise ValueError(f"not the outcomes of the same sequences: {before.shape} and {after.shape}")
    return before, after
