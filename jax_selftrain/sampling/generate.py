"""Continuing prompts of any length until something is found in what was written: generation as evaluations ask for it.

A batch of prompts fills the cache by one forward pass up to the last whole page of each; the rest of a prompt goes
through the same decode steps as its continuation (forced), so that every row is at the same place of its page. Whether
a row has come to its end is asked on the host, page by page: a stop string may end in the middle of a token, which no
device program can see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, UInt32

from jax_selftrain.distributed.mesh import mesh_context
from jax_selftrain.distributed.sharding import shard_host_array
from jax_selftrain.errors import InputError
from jax_selftrain.hub import LoadedModel
from jax_selftrain.models import TAIL_LEN, KVCache, Params
from jax_selftrain.models.prefill import prefill
from jax_selftrain.sampling.categorical import categorical, level_sizes
from jax_selftrain.sampling.counter_rng import per_sample_keys, token_random_bits
from jax_selftrain.sampling.decode import DecodeSpec, decode_chunk, decode_spec, next_token_logits
from jax_selftrain.sampling.sampling_params import SamplingParams, warp_logits

PROMPT_TOKENS = 8192
"""Of prompts that go through one forward pass on a replica, unless said otherwise."""

StopCriterion = Callable[[Sequence[int]], bool]
"""Whether a continuation (all its tokens so far, at least one) ends with its last token."""


@dataclass(frozen=True)
class SamplingSpec:
    """How tokens are drawn, where it is not by taking the most probable one."""

    sampling_params: SamplingParams
    """Temperature and truncation; its start and stop ids and its length limit play no part."""
    seed: int
    """Token t of prompt i is drawn with words that depend on (seed, i, t) alone."""


@dataclass
class _Request:
    """A prompt and what has been written behind it."""

    prompt: Sequence[int]
    generated: list[int]
    done: bool = False

    @property
    def prefilled_len(self) -> int:
        """Prompt tokens in whole pages; at least one token is left to feed."""
        return (len(self.prompt) - 1) // TAIL_LEN * TAIL_LEN

    @property
    def remaining_prompt(self) -> Sequence[int]:
        """Prompt tokens behind the settled ones."""
        return self.prompt[self.prefilled_len :]


def generate_until(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    finished: StopCriterion,
    *,
    draws: SamplingSpec | None = None,
    ids: Sequence[int] | None = None,
    batch_size: int = 64,
    batch_tokens: int = PROMPT_TOKENS,
) -> list[list[int]]:
    """Continue each prompt until it is finished or has `max_tokens` more tokens.

    Args:
      model: on any mesh.
      prompts: token ids, at least one each, fed exactly as they stand (nothing is prepended).
      max_tokens: length limit of a continuation.
      finished: asked after each new token.
      draws: None: the most probable token at each place (the lowest id among equals).
      ids: the number of each prompt, which its draws depend on; default: 0, 1, 2, …
      batch_size: rows per replica that are decoded together, at most.
      batch_tokens: prompt tokens per replica that go through one forward pass; fewer rows where prompts are long.

    Returns:
      The new tokens of each prompt, that with which it finished included.

    Raises:
      InputError: prompt and continuation together are longer than the model's positions.
    """
    if max_tokens < 1 or not all(len(prompt) for prompt in prompts):
        raise ValueError(f"a prompt without tokens, or {max_tokens} tokens to write")
    longest = max(map(len, prompts), default=1)
    if longest + max_tokens > model.config.max_positions:
        raise InputError(
            f"a prompt of {longest} tokens and {max_tokens} more are longer than the model's "
            f"{model.config.max_positions} positions; cut the prompt or ask for fewer"
        )
    rows = [_Request(prompt, []) for prompt in prompts]
    ids = range(len(rows)) if ids is None else ids
    order = sorted(range(len(rows)), key=lambda i: -len(prompts[i]))  # the longest first: memory is short at once
    while order:
        width = _width(len(prompts[order[0]]))
        size = max(1, min(batch_size, batch_tokens // width)) * model.sharding_rules.data_parallelism
        batch, order = order[:size], order[size:]
        _continue_batch(
            model, [rows[i] for i in batch], [ids[i] for i in batch], size, width, max_tokens, finished, draws
        )
    return [row.generated for row in rows]


def _continue_batch(
    model: LoadedModel,
    request_ids: Sequence[_Request],
    ids: Sequence[int],
    size: int,
    width: int,
    max_tokens: int,
    finished: StopCriterion,
    draws: SamplingSpec | None,
) -> None:
    rules, architecture = model.sharding_rules, decode_spec(model)
    rows = [*request_ids, *(_Request([0], [], done=True) for _ in range(size - len(request_ids)))]
    pages = -(-(TAIL_LEN + max_tokens) // TAIL_LEN)
    prompts = np.zeros((size, width), np.int32)
    settled = np.array([row.prefilled_len for row in rows], np.int32)
    fed = np.zeros((TAIL_LEN + 1, size), np.int32)
    lengths = np.array([len(row.remaining_prompt) for row in rows], np.int32)
    for b, row in enumerate(rows):
        prompts[b, : len(row.prompt)] = row.prompt
        fed[: len(row.remaining_prompt), b] = row.remaining_prompt
    keys = np.zeros((size, 2), np.uint32)
    if draws is not None:
        keys[: len(ids)] = per_sample_keys(draws.seed, list(ids))
    sampling_params = None if draws is None else draws.sampling_params
    given = np.arange(1, TAIL_LEN + 1)[:, None] < lengths
    starts = np.array([len(row.prompt) for row in rows], np.int32)
    with mesh_context(rules.mesh):
        by_row = partial(shard_host_array, rules, axes=("batch",))
        cache = _prefill(
            architecture,
            width + pages * TAIL_LEN,
            bool(settled.any()),
            model.params,
            shard_host_array(rules, prompts, ("batch", None)),
        )
        state = cache, by_row(settled), by_row(fed[0])
        for page in range(pages):
            state, found = _decode_chunk(
                architecture,
                sampling_params,
                model.params,
                *state,
                shard_host_array(rules, fed[1:], (None, "batch")),
                shard_host_array(rules, given, (None, "batch")),
                shard_host_array(rules, keys, ("batch", None)),
                by_row(starts),
            )
            for row, following, already in zip(rows, np.asarray(found).T, given.sum(axis=0), strict=True):
                _collect(row, following[already:].tolist(), max_tokens, finished)
            if all(row.done for row in rows):
                return
            if not page:
                given = np.zeros_like(given)


def _collect(row: _Request, tokens: Sequence[int], max_tokens: int, finished: StopCriterion) -> None:
    for token in tokens:
        if row.done:
            return
        row.generated.append(token)
        row.done = len(row.generated) == max_tokens or finished(row.generated)


def _width(length: int) -> int:
    """Padded length of prompts: powers of two from a page on, so that few programs serve any task."""
    return max(TAIL_LEN, 1 << (length - 1).bit_length())


@partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(
    architecture: DecodeSpec, capacity: int, filled: bool, params: Params, prompts: Int32[Array, "B P"]
) -> KVCache:
    """A cache with the prompts in it; an empty one where no prompt fills a page."""
    config, rules = architecture.config, architecture.sharding_rules
    cache = architecture.init_cache(prompts.shape[0], capacity)
    if not filled:
        return cache
    return prefill(config, rules, params, cache, prompts, compute_dtype=architecture.compute_dtype)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def _decode_chunk(
    architecture: DecodeSpec,
    sampling_params: SamplingParams | None,
    params: Params,
    cache: KVCache,
    settled: Int32[Array, " B"],
    token: Int32[Array, " B"],
    forced_mask: Int32[Array, "S B"],
    forced_tokens: Bool[Array, "S B"],
    keys: UInt32[Array, "B 2"],
    starts: Int32[Array, " B"],
) -> tuple[tuple[KVCache, Int32[Array, " B"], Int32[Array, " B"]], Int32[Array, "S B"]]:
    """One page of steps; the token that followed each, whole on every device: forced where it is given."""

    def advance(hidden: jax.Array, position: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits = next_token_logits(architecture, params, hidden)
        if sampling_params is None:
            chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            words = token_random_bits(keys, position + 1 - starts, len(level_sizes(architecture.config.vocab_size)))
            chosen, _ = categorical(warp_logits(logits, sampling_params), words)
        here, is_given = (
            jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False) for x in (forced_mask, forced_tokens)
        )
        following = jnp.where(is_given, here, chosen)
        return following, index + 1, following

    cache, token, _, outs = decode_chunk(architecture, params, cache, settled, token, jnp.int32(0), advance)
    return (cache, settled + TAIL_LEN, token), jax.reshard(outs, architecture.sharding_rules.sharding((None, None)))
