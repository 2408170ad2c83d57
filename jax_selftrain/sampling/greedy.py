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

from jax_selftrain.distributed.mesh import mesh_context
from jax_selftrain.distributed.sharding import shard_host_array
from jax_selftrain.errors import InputError
from jax_selftrain.hub import LoadedModel
from jax_selftrain.models import TAIL_LEN, KVCache, Params
from jax_selftrain.sampling.decode import DecodeSpec, decode_chunk, decode_spec, next_token_logits


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
    batch = batch_size * model.sharding_rules.data_parallelism
    padded = np.concatenate([tokens, np.zeros((-rows % batch, prefix), tokens.dtype)]).astype(np.int32)
    found = [_continue_batch(model, padded[i : i + batch], n) for i in range(0, len(padded), batch)]
    return np.concatenate(found)[:rows] if found else np.zeros((0, n), np.int32)


def _continue_batch(model: LoadedModel, tokens: np.ndarray, n: int) -> np.ndarray:
    prefix, rules = tokens.shape[1], model.sharding_rules
    with mesh_context(rules.mesh):
        forced = shard_host_array(rules, np.ascontiguousarray(tokens.T), (None, "batch"))
        following = jax.device_get(
            _continue(decode_spec(model), -(-(prefix + n - 1) // TAIL_LEN), model.params, forced)
        )
    return following[prefix - 1 : prefix - 1 + n].T


@partial(jax.jit, static_argnums=(0, 1))
def _continue(architecture: DecodeSpec, pages: int, params: Params, forced: Int32[Array, "P B"]) -> Int32[Array, "S B"]:
    """The token that followed each of the steps of so many pages: given while there are any, then the most probable."""
    prefix = forced.shape[0]

    def advance(hidden: jax.Array, position: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def given() -> jax.Array:
            return jax.lax.dynamic_index_in_dim(forced, index + 1, 0, keepdims=False)

        def most_probable() -> jax.Array:
            return jnp.argmax(next_token_logits(architecture, params, hidden), axis=-1).astype(jnp.int32)

        token = jax.lax.cond(index + 1 < prefix, given, most_probable)
        return token, index + 1, token

    def page(state: tuple[KVCache, jax.Array, jax.Array, jax.Array], _: None) -> tuple[tuple, jax.Array]:
        cache, settled, token, index = state
        cache, token, index, outs = decode_chunk(architecture, params, cache, settled, token, index, advance)
        return (cache, settled + TAIL_LEN, token, index), outs

    cache = architecture.init_cache(forced.shape[1], pages * TAIL_LEN)
    begin = (cache, jnp.zeros_like(forced[0]), forced[0], jnp.int32(0))
    _, outs = jax.lax.scan(page, begin, length=pages)
    return outs.reshape(-1, forced.shape[1])
