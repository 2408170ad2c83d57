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

from jax_selftrain.errors import InputError
from jax_selftrain.hub import LoadedModel
from jax_selftrain.mesh import place, using
from jax_selftrain.models import PAGE, Cache, Params
from jax_selftrain.models.prefill import prefill
from jax_selftrain.sampling.decode_loop import Architecture, architecture_of, decode_page, logits_of
from jax_selftrain.sampling.draw import draw, tree_widths
from jax_selftrain.sampling.policy import Policy, mask_logits
from jax_selftrain.sampling.words import sample_keys, token_words

PROMPT_TOKENS = 8192
"""Of prompts that go through one forward pass on a replica, unless said otherwise."""

Finished = Callable[[Sequence[int]], bool]
"""Whether a continuation (all its tokens so far, at least one) ends with its last token."""


@dataclass(frozen=True)
class Draws:
    """How tokens are drawn, where it is not by taking the most probable one."""

    policy: Policy
    """Temperature and truncation; its start and stop ids and its length limit play no part."""
    seed: int
    """Token t of prompt i is drawn with words that depend on (seed, i, t) alone."""


@dataclass
class _Row:
    """A prompt and what has been written behind it."""

    prompt: Sequence[int]
    written: list[int]
    done: bool = False

    @property
    def settled(self) -> int:
        """Prompt tokens in whole pages; at least one token is left to feed."""
        return (len(self.prompt) - 1) // PAGE * PAGE

    @property
    def rest(self) -> Sequence[int]:
        """Prompt tokens behind the settled ones."""
        return self.prompt[self.settled :]


def continue_until(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    finished: Finished,
    *,
    draws: Draws | None = None,
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
    rows = [_Row(prompt, []) for prompt in prompts]
    ids = range(len(rows)) if ids is None else ids
    order = sorted(range(len(rows)), key=lambda i: -len(prompts[i]))  # the longest first: memory is short at once
    while order:
        width = _width(len(prompts[order[0]]))
        size = max(1, min(batch_size, batch_tokens // width)) * model.layout.data
        batch, order = order[:size], order[size:]
        _continue_batch(
            model, [rows[i] for i in batch], [ids[i] for i in batch], size, width, max_tokens, finished, draws
        )
    return [row.written for row in rows]


def _continue_batch(
    model: LoadedModel,
    members: Sequence[_Row],
    ids: Sequence[int],
    size: int,
    width: int,
    max_tokens: int,
    finished: Finished,
    draws: Draws | None,
) -> None:
    layout, architecture = model.layout, architecture_of(model)
    rows = [*members, *(_Row([0], [], done=True) for _ in range(size - len(members)))]
    pages = -(-(PAGE + max_tokens) // PAGE)
    prompts = np.zeros((size, width), np.int32)
    settled = np.array([row.settled for row in rows], np.int32)
    fed = np.zeros((PAGE + 1, size), np.int32)
    lengths = np.array([len(row.rest) for row in rows], np.int32)
    for b, row in enumerate(rows):
        prompts[b, : len(row.prompt)] = row.prompt
        fed[: len(row.rest), b] = row.rest
    keys = np.zeros((size, 2), np.uint32)
    if draws is not None:
        keys[: len(ids)] = sample_keys(draws.seed, list(ids))
    policy = None if draws is None else draws.policy
    given = np.arange(1, PAGE + 1)[:, None] < lengths
    starts = np.array([len(row.prompt) for row in rows], np.int32)
    with using(layout.mesh):
        by_row = partial(place, layout, axes=("batch",))
        cache = _begin(
            architecture,
            width + pages * PAGE,
            bool(settled.any()),
            model.params,
            place(layout, prompts, ("batch", None)),
        )
        state = cache, by_row(settled), by_row(fed[0])
        for page in range(pages):
            state, found = _page(
                architecture,
                policy,
                model.params,
                *state,
                place(layout, fed[1:], (None, "batch")),
                place(layout, given, (None, "batch")),
                place(layout, keys, ("batch", None)),
                by_row(starts),
            )
            for row, following, already in zip(rows, np.asarray(found).T, given.sum(axis=0), strict=True):
                _append(row, following[already:].tolist(), max_tokens, finished)
            if all(row.done for row in rows):
                return
            if not page:
                given = np.zeros_like(given)


def _append(row: _Row, tokens: Sequence[int], max_tokens: int, finished: Finished) -> None:
    for token in tokens:
        if row.done:
            return
        row.written.append(token)
        row.done = len(row.written) == max_tokens or finished(row.written)


def _width(length: int) -> int:
    """Padded length of prompts: powers of two from a page on, so that few programs serve any task."""
    return max(PAGE, 1 << (length - 1).bit_length())


@partial(jax.jit, static_argnums=(0, 1, 2))
def _begin(
    architecture: Architecture, capacity: int, filled: bool, params: Params, prompts: Int32[Array, "B P"]
) -> Cache:
    """A cache with the prompts in it; an empty one where no prompt fills a page."""
    config, layout = architecture.config, architecture.layout
    cache = architecture.init_cache(prompts.shape[0], capacity)
    if not filled:
        return cache
    return prefill(config, layout, params, cache, prompts, compute_dtype=architecture.compute_dtype)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def _page(
    architecture: Architecture,
    policy: Policy | None,
    params: Params,
    cache: Cache,
    settled: Int32[Array, " B"],
    token: Int32[Array, " B"],
    forced: Int32[Array, "S B"],
    given: Bool[Array, "S B"],
    keys: UInt32[Array, "B 2"],
    starts: Int32[Array, " B"],
) -> tuple[tuple[Cache, Int32[Array, " B"], Int32[Array, " B"]], Int32[Array, "S B"]]:
    """One page of steps; the token that followed each, whole on every device: forced where it is given."""

    def advance(hidden: jax.Array, position: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits = logits_of(architecture, params, hidden)
        if policy is None:
            chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            words = token_words(keys, position + 1 - starts, len(tree_widths(architecture.config.vocab_size)))
            chosen, _ = draw(mask_logits(logits, policy), words)
        here, is_given = (jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False) for x in (forced, given))
        following = jnp.where(is_given, here, chosen)
        return following, index + 1, following

    cache, token, _, outs = decode_page(architecture, params, cache, settled, token, jnp.int32(0), advance)
    return (cache, settled + PAGE, token), jax.reshard(outs, architecture.layout.sharding((None, None)))
