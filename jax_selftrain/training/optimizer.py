"""AdamW as Pythia was trained with it: clipping by the global norm, decoupled decay of matrices, warmup, a schedule.

GPT-NeoX (`get_params_for_weight_decay_optimization`) exempts norms and biases from weight decay and decays everything
else, the embedding included; so do we. Its Adam is the decoupled form with bias correction (Loshchilov & Hutter,
arXiv:1711.05101), which is `optax.adamw`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_selftrain.config import TrainConfig
from jax_selftrain.models import Params

WEIGHT_DECAY_PATHS = frozenset({"kernel", "embedding", "lora_a", "lora_b"})
"""Names of the parameters that weight decay applies to; norm scales and biases are exempt."""


def make_schedule(config: TrainConfig, steps: int) -> optax.Schedule:
    """Learning rate of the update with index 0 … steps−1.

    Over the first `warmup_ratio` of the steps it rises linearly from zero; update n of W warmup updates (counted from
    1) has n/W of the peak, so that no step is spent at zero. Then it stays, or falls along half a cosine or a line, to
    reach `final_learning_rate` at the last step.
    """
    peak, warmup = config.learning_rate, round(config.warmup_ratio * steps)
    decay_steps = max(1, steps - warmup)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        done = jnp.asarray(count, jnp.result_type(float)) + 1  # float32, or float64 where JAX was asked for it
        fraction = jnp.clip((done - warmup) / decay_steps, 0, 1)
        if config.schedule == "constant":
            after = jnp.full_like(fraction, peak)
        elif config.schedule == "linear":
            after = peak + (config.final_learning_rate - peak) * fraction
        else:
            span = (peak - config.final_learning_rate) / 2
            after = config.final_learning_rate + span * (1 + jnp.cos(jnp.pi * fraction))
        return jnp.where(done < warmup, peak * done / max(1, warmup), after)

    return schedule


def make_optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """The chain that turns gradients of the mean loss into updates."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=partial(decay_mask, embeddings=config.decay_embeddings),
    )
    return optax.chain(clip, adamw)


def decay_mask(params: Params, *, embeddings: bool = True) -> Params:
    """True for every parameter that weight decay applies to: matrices and, where asked, the embedding."""
    names = WEIGHT_DECAY_PATHS if embeddings else WEIGHT_DECAY_PATHS - {"embedding"}
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)


def apply_updates(params: Params, updates: Params) -> Params:
    """Add the updates, in their own type; a zero update leaves its parameter's bits alone.

    Plain addition would turn −0.0 into +0.0: a student trained at learning rate 0 would not *be* its base.
    """
    return jax.tree.map(lambda p, u: jnp.where(u == 0, p.astype(u.dtype), p.astype(u.dtype) + u), params, updates)


def cast_params(tree: Any, dtype: jax.typing.DTypeLike, key: jax.Array | None) -> Any:
    """Floating-point arrays in the type they are stored in: to the nearest or, with a key, stochastically.

    Stochastic rounding takes the upper or the lower neighbor with probabilities that make the mean exact, so that
    updates smaller than half a step of bfloat16 count on average (Gupta et al., arXiv:1502.02551).

    Args:
      tree: arrays, float32; others (counters) pass through.
      dtype: float32 (nothing to do) or bfloat16.
      key: of the random bits; leaf n uses `fold_in(key, n)`. The same on every mesh.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    found = []
    for n, leaf in enumerate(leaves):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            found.append(leaf)
        elif key is None:
            found.append(leaf.astype(dtype))
        else:
            found.append(_stochastic_round(leaf, jax.random.fold_in(key, n)))
    return jax.tree.unflatten(structure, found)


def _stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 → bfloat16: a random number below one step is added to the bits, the lower half is cut off."""
    noise = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=jax.typeof(x).sharding)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise.astype(jnp.uint32)
    cut = jax.lax.bitcast_convert_type(bits & np.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)
