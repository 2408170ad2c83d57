"""Sampling parameters: temperature, truncation, and the start and end of a sample.

Truncation follows transformers' `generate` (generation/logits_process.py, 5.x): temperature, then top-k, then top-p,
then min-p, each applied to the result of the one before. Two rules are our own:

* *Ties.* Tokens with exactly equal logits are kept or dropped together. transformers does the same for top-k and
  min-p; its top-p cuts through a tie in the order of its sort.
* *Padding.* Ids past the tokenizer's length (GPT-NeoX pads its vocabulary) are excluded first: they have no text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jax_selftrain.config import SampleConfig, yaml_io
from jax_selftrain.errors import InputError
from jax_selftrain.hub import SpecialTokens
from jax_selftrain.models import DecoderConfig
from jax_selftrain.sampling.categorical import replicate_vocab


@dataclass(frozen=True)
class SamplingParams:
    """Distribution and length of samples: a static argument of programs."""

    max_tokens: int = 16
    """Maximum number of new tokens; the start token does not count."""
    stop_ids: tuple[int, ...] = ()
    """A sample ends when it draws one of these; sorted. Empty: samples end by length alone."""
    start_id: int = 0
    """First token of a sample that has no prompt."""
    temperature: float = 1.0
    """0: greedy decoding, the lowest id among equal logits (`generate` only)."""
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    """1: off."""
    min_p: float = 0.0
    """0: off."""
    num_valid_ids: int | None = None
    """Only smaller ids may be drawn; None: all."""

    @property
    def changes_distribution(self) -> bool:
        """True if valid tokens have other probabilities than under the model."""
        return self.temperature != 1.0 or self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def make_sampling_params(config: SampleConfig, model: DecoderConfig, special: SpecialTokens) -> SamplingParams:
    """Combine the options of a stage with the defaults of a model.

    Args:
      config: its options override the defaults.
      model: the architecture.
      special: start and stop ids of the model's files.

    Raises:
      InputError: there is no start token, an id is outside the vocabulary, or samples are longer than the model allows.
    """
    yaml_io.check_ranges(config)
    start = config.start_id if config.start_id is not None else special.bos_token_id
    if start is None:
        raise InputError(
            f"{config.model}: neither its tokenizer nor its config names a BOS or EOS token to start from; "
            "choose one with --start-id"
        )
    stops = config.stop_ids if config.stop_ids is not None else special.eos_token_ids
    valid = model.vocab_size if special.tokenizer_length is None else min(model.vocab_size, special.tokenizer_length)
    if not 0 <= start < model.vocab_size:
        raise InputError(f"--start-id {start} is outside the vocabulary of {config.model} (0 … {model.vocab_size - 1})")
    for stop in stops:
        if not 0 <= stop < valid:
            raise InputError(
                f"--stop-ids {stop} is outside the vocabulary of {config.model}, whose tokens are 0 … {valid - 1}"
            )
    if config.max_tokens > model.max_positions:
        raise InputError(
            f"--max-tokens {config.max_tokens} is longer than the {model.max_positions} positions of {config.model}; "
            f"ask for at most {model.max_positions}"
        )
    return SamplingParams(
        start_id=start,
        stop_ids=tuple(sorted(set(stops))),
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        num_valid_ids=valid if valid < model.vocab_size else None,
    )


def warp_logits(logits: Float[Array, "B V"], sampling_params: SamplingParams) -> Float[Array, "B V"]:
    """Apply temperature and truncation.

    Excluded tokens become −inf. The vocabulary is whole on every device of a replica. Disabled steps compile to
    nothing.
    """
    logits = replicate_vocab(logits)
    if sampling_params.num_valid_ids is not None:
        logits = jnp.where(jnp.arange(logits.shape[1]) < sampling_params.num_valid_ids, logits, -jnp.inf)
    if sampling_params.temperature != 1.0:
        logits = logits / np.float32(sampling_params.temperature)
    if 0 < sampling_params.top_k < logits.shape[1]:
        k = sampling_params.top_k
        logits = _threshold_search(logits, lambda kept: jnp.sum(kept, -1, keepdims=True, dtype=jnp.int32) >= k)
    if sampling_params.top_p < 1.0:
        weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        max_dropped = np.float32(1.0 - sampling_params.top_p) * jnp.sum(weights, axis=-1, keepdims=True)
        logits = _threshold_search(
            logits, lambda kept: jnp.sum(jnp.where(kept, 0.0, weights), axis=-1, keepdims=True) <= max_dropped
        )
    if sampling_params.min_p > 0.0:
        ratio = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        logits = jnp.where(ratio < np.float32(sampling_params.min_p), -jnp.inf, logits)
    return logits


def full_logsumexp(
    logits: Float[Array, "B V"], sampling_params: SamplingParams, warped_logsumexp: Float[Array, " B"]
) -> Float[Array, " B"]:
    """Return log Σ exp(logits) over the whole vocabulary at temperature 1.

    Args:
      logits: unwarped, vocabulary whole.
      warped_logsumexp: log Σ exp of `warp_logits(logits, sampling_params)`; saves a pass if only padding is excluded.

    Returns:
      fp32; not finite where the logits are no distribution (NaN or +inf).
    """
    num_valid_ids = sampling_params.num_valid_ids
    if sampling_params.changes_distribution:
        return jax.nn.logsumexp(logits, axis=-1)
    if num_valid_ids is None or num_valid_ids >= logits.shape[1]:
        return warped_logsumexp
    return jnp.logaddexp(warped_logsumexp, jax.nn.logsumexp(logits[:, num_valid_ids:], axis=-1))


def _threshold_search(
    logits: Float[Array, "B V"], suffices: Callable[[Bool[Array, "B V"]], Bool[Array, "B 1"]]
) -> Float[Array, "B V"]:
    """Keep logits above the highest floor that suffices, and always the largest.

    A bisection over the ordered integers of fp32 finds the floor exactly in 32 passes; a sort took ten times as long.
    """
    bits = jax.lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.uint32)  # −0 and 0 are equal
    order = jnp.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))

    def raise_floor(i: Array, floor: Array) -> Array:
        higher = floor | (np.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(suffices(order >= higher), higher, floor)

    top = jnp.max(order, axis=-1, keepdims=True)
    floor = jax.lax.fori_loop(0, 32, raise_floor, jnp.zeros_like(top))
    return jnp.where(order >= jnp.minimum(floor, top), logits, -jnp.inf)
