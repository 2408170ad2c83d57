"""What a model does with known sequences: greedy exact match and suffix probabilities, from one teacher-forced pass.

Exact match needs no decoding: the greedy continuation of the prefix is the suffix iff at every place of the suffix the
most probable token, given the true tokens before it, is the true one. The same logits give log p_z under every policy
asked for. Only suffix places are projected to the vocabulary, one place of all rows after the other, so that logits of
one place exist at a time. All batches have one shape: a sequence's numbers do not depend on the others.

What is not exact match (`token_accuracy`) asks what the model says on its own path: those sequences are decoded.
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
from jax_selftrain.sampling import SamplingParams, greedy_continue, warp_logits

MAX_BATCH_ROWS = 512
"""Rows in one batch of a device at most: at V = 50k the fp32 logits of one place of so many take 100 MB."""


def extraction_metrics(
    model: hub.LoadedModel,
    sequences: np.ndarray,
    prefix: int,
    *,
    policies: Sequence[NamedSamplingParams] = (),
    batch_tokens: int = 8192,
    free_running: bool = True,
) -> dict[str, np.ndarray]:
    """Extraction of each of N sequences by a model in memory.

    Args:
      model: from `hub.load_model`.
      sequences: integer [N, prefix + suffix].
      prefix: tokens given, at least one; the rest is the suffix.
      policies: under which log p_z is wanted beside temperature 1.
      batch_tokens: token positions in one device batch.
      free_running: decode what is no exact match, for `token_accuracy`; most of the work.

    Returns:
      Arrays [N]: `exact_match` (bool), `matched_tokens` (length of the longest common prefix of suffix and greedy
      continuation), `token_accuracy` (share of the suffix that the free-running greedy continuation has at its
      place), `teacher_forced_accuracy` (the same, each token predicted from the true ones), `logprob` (log p_z at
      temperature 1, nats), and log p_z under each policy by its `column`, −inf where p_z = 0.

    Raises:
      InputError: a log-probability is not a number.
    """
    forced = score_suffixes(model, sequences, prefix, policies=policies, batch_tokens=batch_tokens)
    if not free_running:
        return forced
    exact, suffixes = forced["exact_match"], sequences[:, prefix:]
    # Where every teacher-forced argmax is right, the free-running continuation is the suffix: only the rest is decoded.
    said = suffixes.copy()
    rows = batch_rows(model.sharding_rules, sequences.shape[1], batch_tokens) // model.sharding_rules.data_parallelism
    said[~exact] = greedy_continue(model, sequences[~exact, :prefix], suffixes.shape[1], batch_size=rows)
    return {
        "exact_match": exact,
        "matched_tokens": forced.pop("matched_tokens"),
        "token_accuracy": (said == suffixes).mean(axis=1),
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
    """What one teacher-forced pass tells: all that `extraction_metrics` returns but `token_accuracy`, which has to be decoded."""
    suffixes = np.asarray(sequences)[:, prefix:]
    rows = batch_rows(model.sharding_rules, sequences.shape[1], batch_tokens)
    asked = tuple(named.sampling_params for named in policies)
    greedy = np.empty(suffixes.shape, np.int32)
    logprobs = np.empty((len(suffixes), 1 + len(asked), suffixes.shape[1]), np.float32)
    with mesh_context(model.sharding_rules.mesh):
        for first in range(0, len(sequences), rows):
            batch = np.zeros((rows, sequences.shape[1]), np.int32)
            members = sequences[first : first + rows]
            batch[: len(members)] = members
            tokens = shard_host_array(model.sharding_rules, batch, ("batch", None))
            found = suffix_scores_program(
                model.config, model.sharding_rules, model.compute_dtype, prefix, asked, model.params, tokens
            )
            for kept, part in zip((logprobs, greedy), jax.device_get(found), strict=True):
                kept[first : first + rows] = part[: len(members)]
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
) -> tuple[Float[Array, "B P S"], Int[Array, "B S"]]:
    """Log-probability of every suffix token (S of them) at temperature 1 and under each policy, and the argmax there.

    Args:
      config, rules, compute_dtype, prefix, policies: static.
      params: the model.
      tokens: whole sequences of prefix and suffix, sharded on the batch.

    Returns:
      nats, fp32, P = 1 + policies; the most probable token (the lowest id among equals). Whole on every device.
    """
    hidden = forward(config, rules, params, tokens[:, :-1], compute_dtype=compute_dtype)
    places = jnp.moveaxis(hidden[:, prefix - 1 :], 1, 0), jnp.moveaxis(tokens[:, prefix:], 1, 0)

    def score_place(_: None, inputs: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        rows, target = inputs
        logits = unembed(config, rules, params, rows, compute_dtype=compute_dtype)
        ids = jax.lax.broadcasted_iota(jnp.int32, (1, logits.shape[-1]), 1)
        best = jnp.max(logits, axis=-1, keepdims=True)
        # Reductions over V alone, which may be sharded, where gathers and `argmax` would move the logits.
        greedy = jnp.min(jnp.where(logits == best, ids, logits.shape[-1]), axis=-1)
        views = [logits, *(warp_logits(logits, sampling_params) for sampling_params in policies)]
        return None, (jnp.stack([_log_prob(view, ids == target[:, None]) for view in views], axis=1), greedy)

    _, (logprobs, greedy) = jax.lax.scan(score_place, None, places)
    replicated = PartitionSpec()
    return jax.reshard(jnp.moveaxis(logprobs, 0, 2), replicated), jax.reshard(greedy.T, replicated)


def kept_lost_gained(before: np.ndarray, after: np.ndarray) -> dict[str, int]:
    """How yes/no outcomes of the same sequences moved: `kept`, `lost`, `gained`, `never`."""
    before, after = _paired(before, after)
    return {
        "kept": int((before & after).sum()),
        "lost": int((before & ~after).sum()),
        "gained": int((~before & after).sum()),
        "never": int((~before & ~after).sum()),
    }


def flip_rate(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> float:
    """Share of the sequences whose exact match differs between two measurements of one model.

    The A/A rate, across batch sizes, meshes or dtypes, is the floor under any change between two models.

    Args:
      first, second: from `extraction_metrics` or `teacher_forced`, of the same sequences.
    """
    before, after = _paired(first["exact_match"], second["exact_match"])
    return float((before != after).mean())


def _log_prob(logits: Float[Array, "B V"], target: Array) -> Float[Array, " B"]:
    """log softmax at the one target of each row (bool [B, V]); −inf for one that is masked."""
    best = jnp.max(logits, axis=-1, keepdims=True)
    log_sum = jnp.log(jnp.sum(jnp.exp(logits - best), axis=-1))
    return jnp.sum(jnp.where(target, logits - best, 0.0), axis=-1) - log_sum


def batch_rows(rules: ShardingRules, length: int, batch_tokens: int) -> int:
    """Rows in one batch of sequences of this length, over the whole mesh."""
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


def _paired(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    before, after = np.asarray(before, bool), np.asarray(after, bool)
    if before.shape != after.shape or not before.size:
        raise ValueError(f"not the outcomes of the same sequences: {before.shape} and {after.shape}")
    return before, after
