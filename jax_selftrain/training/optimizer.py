"""AdamW as Pythia was trained with it: clipping by the global norm, decoupled decay of matrices, warmup, a schedule.

GPT-NeoX (`get_params_for_weight_decay_optimization`) exempts norms and biases from weight decay and decays everything
else, the embedding included; so do we. Its Adam is the decoupled form with bias correction (Loshchilov & Hutter,
arXiv:1711.05101), which is `optax.adamw`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jax_selftrain.config import TrainConfig
from jax_selftrain.models import Params

DECAYED = frozenset({"kernel", "embedding"})
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
        done = jnp.asarray(count, jnp.float32) + 1
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
        mask=decay_mask,
    )
    return optax.chain(clip, adamw)


def decay_mask(params: Params) -> Params:
    """True for every parameter that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def apply_updates(params: Params, updates: Params) -> Params:
    """Add the updates; a zero update leaves its parameter's bits alone.

    Plain addition would turn −0.0 into +0.0: a student trained at learning rate 0 would not *be* its base.
    """
    return jax.tree.map(lambda p, u: jnp.where(u == 0, p, p + u), params, updates)
