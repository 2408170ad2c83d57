"""Greedy continuation of given prefixes: what extraction calls free-running decoding.

The prefix goes through the same decode steps as the continuation (forced, one token a step): prefixes are as short as
the suffixes, and so there is one way of filling the cache instead of two that would have to agree.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from jax_selftrain.errors import InputError
from jax_selftrain.hub import LoadedModel
from jax_selftrain.mesh import place
from jax_selftrain.models import PAGE, Cache, Params, grow_cache, init_cache
from jax_selftrain.sampling.decode import Architecture, architecture_of, capacities, decode_page, logits_of


def greedy_continue(
    model: LoadedModel, tokens: Int32[np.ndarray, "N P"], n: int, *, batch_size: int = 64
) -> Int32[np.ndarray, "N n"]:
    """Continue each row by its most probable tokens (the lowest id among equals); stop ids do not stop it.

    Args:
      model: on any mesh.
      tokens: prefixes, at least one token each, fed exactly as they stand (nothing is prepended).
      n: tokens to append.
      batch_size: rows per replica that are decoded together.

    Raises:
      InputError: prefix and continuation together are longer than the model's positions.
    """
    rows, prefix = tokens.shape
    if prefix < 1 or n < 1:
        raise ValueError(f"a prefix of {prefix} tokens cannot be continued by {n}")
    if prefix + n > model.config.max_positions:
        raise InputError(
            f"a prefix of {prefix} and a suffix of {n} tokens are longer than the model's "
            f"{model.config.max_positions} positions; ask for shorter ones"
        )
    batch = batch_size * model.layout.data
    padded = np.concatenate([tokens, np.zeros((-rows % batch, prefix), tokens.dtype)]).astype(np.int32)
    found = [_continue_batch(model, padded[i : i + batch], n) for i in range(0, len(padded), batch)]
    return np.concatenate(found)[:rows] if found else np.zeros((0, n), np.int32)


def _continue_batch(model: LoadedModel, tokens: np.ndarray, n: int) -> np.ndarray:
    architecture, (rows, prefix) = architecture_of(model), tokens.shape
    layout = model.layout
    with jax.set_mesh(layout.mesh):
        segments = capacities(prefix + n - 1)
        forced = place(layout, np.ascontiguousarray(tokens.T), (None, "batch"))
        cache = _empty(architecture, rows, segments[0])
        token, outs, settled = forced[0], [], 0
        for capacity in segments:
            if capacity > cache.capacity:
                cache = _grow(layout, cache, capacity)
            pages = (settled // PAGE, capacity // PAGE)
            cache, token, out = _segment(architecture, pages, model.params, forced, cache, token)
            outs.append(jax.device_get(out))
            settled = capacity
    return np.concatenate(outs)[prefix - 1 : prefix - 1 + n].T


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4,))
def _segment(
    architecture: Architecture,
    pages: tuple[int, int],
    params: Params,
    forced: Int32[Array, "P B"],
    cache: Cache,
    token: Int32[Array, " B"],
) -> tuple[Cache, Int32[Array, " B"], Int32[Array, "S B"]]:
    """Run pages `pages[0]` … `pages[1]`−1; the last output is the token that followed each step."""
    prefix = forced.shape[0]

    def advance(hidden: jax.Array, position: jax.Array, carry: None) -> tuple[jax.Array, None, jax.Array]:
        def given() -> jax.Array:
            return jax.lax.dynamic_index_in_dim(forced, position + 1, 0, keepdims=False)

        def most_probable() -> jax.Array:
            return jnp.argmax(logits_of(architecture, params, hidden), axis=-1).astype(jnp.int32)

        token = jax.lax.cond(position + 1 < prefix, given, most_probable)
        return token, carry, token

    def page(state: tuple[Cache, jax.Array], index: jax.Array) -> tuple[tuple[Cache, jax.Array], jax.Array]:
        cache, token, _, outs = decode_page(architecture, params, state[0], index, state[1], None, advance)
        return (cache, token), outs

    (cache, token), outs = jax.lax.scan(page, (cache, token), jnp.arange(*pages, dtype=jnp.int32))
    return cache, token, outs.reshape(-1, token.shape[0])


def _init(architecture: Architecture, rows: int, capacity: int) -> Cache:
    return init_cache(architecture.config, architecture.layout, rows, capacity, architecture.compute_dtype)


_empty = jax.jit(_init, static_argnums=(0, 1, 2))
_grow = jax.jit(grow_cache, static_argnums=(0, 2))
