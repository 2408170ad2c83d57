"""The sampling policy: what is drawn from, from where, and until when.

Truncation follows transformers' `generate` (generation/logits_process.py, 5.x): temperature, then top-k, then top-p,
then min-p, each on what the one before has left. Two definitions are ours to state:

* *Ties.* Tokens whose logits are exactly equal are kept or dropped together. transformers does the same for top-k and
  min-p; for top-p it cuts through a tie in the order its sort happens to leave.
* *Padding.* Ids past the tokenizer's length (GPT-NeoX pads its vocabulary) are excluded first: they have no text.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_selftrain.config import SampleConfig
from jax_selftrain.errors import InputError
from jax_selftrain.sampling.draw import whole_rows
from jax_selftrain.sampling.words import MAX_SEED


@dataclass(frozen=True)
class Policy:
    """How samples are drawn. Hashable: a static argument of the decode program."""

    start_id: int
    """The token every sample starts from."""
    stop_ids: tuple[int, ...]
    """Drawing one of these ends a sample; sorted. Empty: samples end by length alone."""
    max_tokens: int
    """Length limit, the start token not counted."""
    temperature: float = 1.0
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    """1: off."""
    min_p: float = 0.0
    """0: off."""
    valid_ids: int | None = None
    """Only ids below this may be drawn; None: all."""


def make_policy(
    config: SampleConfig,
    *,
    start_id: int | None,
    stop_ids: tuple[int, ...],
    vocab_size: int,
    tokenizer_length: int | None,
    max_positions: int,
) -> Policy:
    """The policy of a stage's options over a model's defaults.

    Args:
      config: flags win over the defaults that follow.
      start_id, stop_ids: what the model's own files say (None: nothing is said).
      vocab_size: V of the model; tokenizer_length: ids the tokenizer knows (None: no tokenizer).
      max_positions: longest sequence the model is meant for.

    Raises:
      InputError: no start token is known, an id is outside the vocabulary, or samples would outgrow the model.
    """
    check_sample_config(config)
    start = config.start_id if config.start_id is not None else start_id
    if start is None:
        raise InputError(
            f"{config.model}: neither its tokenizer nor its config names a BOS or EOS token to start from; "
            "choose one with --start-id"
        )
    stops = config.stop_ids if config.stop_ids is not None else stop_ids
    valid = vocab_size if tokenizer_length is None else min(vocab_size, tokenizer_length)
    if not 0 <= start < vocab_size:
        raise InputError(f"--start-id {start} is outside the vocabulary of {config.model} (0 … {vocab_size - 1})")
    for stop in stops:
        if not 0 <= stop < valid:
            raise InputError(
                f"--stop-ids {stop} is outside the vocabulary of {config.model}, whose tokens are 0 … {valid - 1}"
            )
    if config.max_tokens > max_positions:
        raise InputError(
            f"--max-tokens {config.max_tokens} is longer than the {max_positions} positions of {config.model}; "
            f"ask for at most {max_positions}"
        )
    return Policy(
        start_id=start,
        stop_ids=tuple(sorted(set(stops))),
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        valid_ids=valid if valid < vocab_size else None,
    )


def check_sample_config(config: SampleConfig) -> None:
    """Refuse impossible options before any file is read.

    Raises:
      InputError: names the first impossible one.
    """
    if not (config.temperature > 0 and np.isfinite(config.temperature)):
        raise InputError(f"--temperature must be a finite number above 0, not {config.temperature}")
    if not 0 < config.top_p <= 1:
        raise InputError(f"--top-p must be above 0 and at most 1 (1: off), not {config.top_p}")
    if not 0 <= config.min_p <= 1:
        raise InputError(f"--min-p must be between 0 (off) and 1, not {config.min_p}")
    if config.top_k < 0:
        raise InputError(f"--top-k must be at least 0 (0: off), not {config.top_k}")
    for name in ("samples", "max_tokens", "batch_size", "samples_per_shard"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(config, name)}")
    if not 0 <= config.seed <= MAX_SEED:
        raise InputError(f"--seed must be between 0 and 2^64 - 1, not {config.seed}")


def mask_logits(logits: Float[Array, "B V"], policy: Policy) -> Float[Array, "B V"]:
    """Logits of the distribution to draw from: divided by the temperature, −inf for excluded tokens, vocabulary whole.

    Steps that the policy leaves off cost nothing; in particular nothing is sorted without top-p.
    """
    logits = whole_rows(logits)
    if policy.valid_ids is not None:
        logits = jnp.where(jnp.arange(logits.shape[1]) < policy.valid_ids, logits, -jnp.inf)
    if policy.temperature != 1.0:
        logits = logits / np.float32(policy.temperature)
    if 0 < policy.top_k < logits.shape[1]:
        logits = _keep(logits, jax.lax.top_k(logits, policy.top_k)[0][:, -1:])
    if policy.top_p < 1.0:
        logits = _keep(logits, _nucleus_floor(logits, policy.top_p))
    if policy.min_p > 0.0:
        ratio = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        logits = jnp.where(ratio < np.float32(policy.min_p), -jnp.inf, logits)
    return logits


def _keep(logits: Float[Array, "B V"], floor: Float[Array, "B 1"]) -> Float[Array, "B V"]:
    return jnp.where(logits < floor, -jnp.inf, logits)


def _nucleus_floor(logits: Float[Array, "B V"], top_p: float) -> Float[Array, "B 1"]:
    """The smallest logit kept by top-p.

    From the least probable token upwards, as transformers does it, tokens are dropped while the probability dropped
    so far stays at or below 1 − p: summed this way, the many small terms are added to each other first.
    """
    ascending = jnp.sort(logits, axis=-1)
    weights = jnp.exp(ascending - ascending[:, -1:])
    cumulative = jnp.cumsum(weights, axis=-1)
    dropped = cumulative <= np.float32(1.0 - top_p) * cumulative[:, -1:]
    kept = jnp.where(dropped, jnp.inf, ascending)
    return jnp.minimum(jnp.min(kept, axis=-1, keepdims=True), ascending[:, -1:])
