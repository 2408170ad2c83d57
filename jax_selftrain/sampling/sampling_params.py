"""Sampling parameters: temperature, truncation, and the start and end of a sample.

Truncation follows transformers' `generate` (generation/logits_process.py, 5.x): min tokens, temperature, top-k, top-p,
min-p, each applied to the result of the one before. Two rules are our own:

* *Ties.* Tokens with exactly equal logits are kept or dropped together. transformers does the same for top-k and
  min-p; its top-p cuts through a tie in the order of its sort.
* *Padding.* Ids that are no token (GPT-NeoX pads its vocabulary; some have holes) are excluded first: they have no
  text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from jax_selftrain.config import SampleConfig, yaml_io
from jax_selftrain.errors import InputError
from jax_selftrain.hub import SpecialTokens
from jax_selftrain.models import DecoderConfig
from jax_selftrain.models.kv_cache import TAIL_LEN
from jax_selftrain.sampling.categorical import replicate_vocab

POLICY_FIELDS: dict[str, type] = {"temperature": float, "top_k": int, "top_p": float, "min_p": float}
"""Options of the distribution of a token, and their types."""


@dataclass(frozen=True)
class SamplingParams:
    """Distribution and length of samples: a static argument of programs."""

    max_tokens: int = 16
    """Maximum number of new tokens; the start token does not count."""
    stop_ids: tuple[int, ...] = ()
    """A sample ends when it draws one of these; sorted. Empty: samples end by length alone."""
    start_ids: tuple[int, ...] = (0,)
    """Tokens that precede each sample of `DecodeLoop`; they are not part of it."""
    min_tokens: int = 0
    """Stop ids have probability zero before a sample has this many tokens (`DecodeLoop` only)."""
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
    unused_ids: tuple[int, ...] = ()
    """Ids below that are no token and may not be drawn either."""

    @property
    def changes_distribution(self) -> bool:
        """True if valid tokens have other probabilities than under the model."""
        masks_stop_ids = self.min_tokens > 0 and bool(self.stop_ids)
        return self.temperature != 1.0 or self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0 or masks_stop_ids

    @property
    def prefilled_len(self) -> int:
        """Start tokens in whole chunks; at least one start token remains."""
        return (len(self.start_ids) - 1) // TAIL_LEN * TAIL_LEN

    @property
    def num_forced(self) -> int:
        """Decode steps of each sample before its first drawn token."""
        return len(self.start_ids) - 1 - self.prefilled_len

    @property
    def output_len(self) -> int:
        """Forced and drawn tokens of a sample, rounded up to whole chunks."""
        return -(-(self.num_forced + self.max_tokens) // TAIL_LEN) * TAIL_LEN


def make_sampling_params(
    config: SampleConfig, model: DecoderConfig, special: SpecialTokens, tokenizer: Any = None
) -> SamplingParams:
    """Combine the options of a stage with the defaults of a model.

    Args:
      config: its options override the defaults.
      model: the architecture.
      special: start and stop ids of the model's files.
      tokenizer: for `start_text`.

    Raises:
      InputError: there is no start token, an id is outside the vocabulary, or samples are longer than the model allows.
    """
    yaml_io.check_ranges(config)
    start_ids = _start_ids(config, special, tokenizer)
    stops = config.stop_ids if config.stop_ids is not None else special.eos_token_ids
    valid = model.vocab_size if special.tokenizer_length is None else min(model.vocab_size, special.tokenizer_length)
    for start in start_ids:
        if not 0 <= start < model.vocab_size:
            raise InputError(
                f"--start-id {start} is outside the vocabulary of {config.model} (0 … {model.vocab_size - 1})"
            )
    for stop in stops:
        if not 0 <= stop < valid:
            raise InputError(
                f"--stop-ids {stop} is outside the vocabulary of {config.model}, whose tokens are 0 … {valid - 1}"
            )
    room = model.max_positions - (len(start_ids) - 1)
    if config.max_tokens > room:
        after = f" after {len(start_ids)} start tokens" if len(start_ids) > 1 else ""
        raise InputError(
            f"--max-tokens {config.max_tokens} is longer than the {model.max_positions} positions of {config.model}"
            f"{after}; ask for at most {room}"
        )
    if config.min_tokens > config.max_tokens:
        raise InputError(f"--min-tokens {config.min_tokens} is more than --max-tokens {config.max_tokens}; lower it")
    return SamplingParams(
        start_ids=start_ids,
        min_tokens=config.min_tokens,
        stop_ids=tuple(sorted(set(stops))),
        max_tokens=config.max_tokens,
        num_valid_ids=valid if valid < model.vocab_size else None,
        unused_ids=special.unused_ids,
        **{name: getattr(config, name) for name in POLICY_FIELDS},
    )


def _start_ids(config: SampleConfig, special: SpecialTokens, tokenizer: Any) -> tuple[int, ...]:
    """Tokenize the start text, or choose the start id."""
    if config.start_text is None:
        if config.add_special_tokens:
            raise InputError("--add-special-tokens concerns --start-text; give a start text too")
        start = config.start_id if config.start_id is not None else special.bos_token_id
        if start is None:
            raise InputError(
                f"{config.model}: neither its tokenizer nor its config names a BOS or EOS token to start from; "
                "choose one with --start-id or --start-text"
            )
        return (start,)
    if config.start_id is not None:
        raise InputError("--start-id and --start-text exclude each other; give one of them")
    if tokenizer is None:
        raise InputError(f"{config.model}: has no tokenizer for --start-text; give --start-id instead")
    ids = tokenizer(config.start_text, add_special_tokens=config.add_special_tokens)["input_ids"]
    if not ids:
        raise InputError(f"--start-text {config.start_text!r}: has no tokens; give a longer text or --start-id")
    return tuple(ids)


def warp_logits(
    logits: Float[Array, "B V"], sampling_params: SamplingParams, length: Int32[Array, " B"] | None = None
) -> Float[Array, "B V"]:
    """Apply min tokens, temperature and truncation.

    Excluded tokens become −inf. The vocabulary is whole on every device of a replica. Disabled steps compile to
    nothing.

    Args:
      length: tokens of each sample so far; required with min tokens.
    """
    logits = replicate_vocab(logits)
    if sampling_params.min_tokens and sampling_params.stop_ids:
        if length is None:
            raise ValueError("min_tokens needs the lengths of the samples")
        is_stop = jnp.isin(jnp.arange(logits.shape[1]), np.asarray(sampling_params.stop_ids))
        logits = jnp.where(is_stop & (length < sampling_params.min_tokens)[:, None], -jnp.inf, logits)
    if sampling_params.num_valid_ids is not None:
        logits = jnp.where(jnp.arange(logits.shape[1]) < sampling_params.num_valid_ids, logits, -jnp.inf)
    if sampling_params.unused_ids:
        logits = jnp.where(np.isin(np.arange(logits.shape[1]), sampling_params.unused_ids), -jnp.inf, logits)
    if sampling_params.temperature != 1.0:
        # Differences to the maximum stay exact at any temperature; the limits keep 1 / temperature a normal float32.
        temperature = np.float32(np.clip(sampling_params.temperature, 1e-37, 1e37))
        logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
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
    if sampling_params.unused_ids:
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
