"""Attention over whole rows, for training and scoring."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from jax_selftrain.models.layers import contract


@partial(
    jax.checkpoint, static_argnums=(4,), policy=jax.checkpoint_policies.save_only_these_names("attention over values")
)
def attention_over(
    q: Float[Array, "B T G R K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    visible: Bool[Array, "#B T S"],
    compute_dtype: jax.typing.DTypeLike,
) -> Float[Array, "B T G R K"]:
    """The written-out form, the reference: softmax(q kᵀ / √K) v over the visible positions.

    Weights are divided by their sum after they have met the values, so that the backward pass has no sum over [T, S]
    either; and no array of that shape is kept for it: the weights, not their product with the values, are computed
    again.
    """
    scores = contract("btgrk,bsgk->bgrts", q * q.shape[-1] ** -0.5, k, compute_dtype)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.einsum("bgrts->btgr", weights)
    context = contract("bgrts,bsgk->btgrk", weights, v, compute_dtype)
    return checkpoint_name(context, "attention over values") / total[..., None]
