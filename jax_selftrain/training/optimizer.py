"""AdamW and learning-rate schedules as in the training of Pythia.

GPT-NeoX (`get_params_for_weight_decay_optimization`) decays all parameters, the embedding included, except norms and
biases. Adam has bias correction and decoupled decay (Loshchilov & Hutter, arXiv:1711.05101), as `optax.adamw`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_selftrain.config import TrainConfig
from jax_selftrain.models import Params

WEIGHT_DECAY_PATHS = frozenset({"kernel", "embedding", "positions", "lora_a", "lora_b"})
"""Names of the parameters with weight decay; norm scales and biases have none."""


def make_schedule(config: TrainConfig, steps: int) -> optax.Schedule:
    """Return the learning rate by update index, 0 … steps−1.

    The rate rises linearly over the first `warmup_ratio` of the steps: update n of W (counted from 1) has n/W of the
    peak, so that no update has rate zero. Then it is constant, or falls along half a cosine or a line and reaches
    `final_learning_rate` at the last update.
    """
    peak, warmup = config.learning_rate, round(config.warmup_ratio * steps)
    decay_steps = max(1, steps - warmup)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        update = jnp.asarray(count, jnp.result_type(float)) + 1  # float64 under jax.enable_x64
        fraction = jnp.clip((update - warmup) / decay_steps, 0, 1)
        if config.schedule == "constant":
            rate = jnp.full_like(fraction, peak)
        elif config.schedule == "linear":
            rate = peak + (config.final_learning_rate - peak) * fraction
        else:
            amplitude = (peak - config.final_learning_rate) / 2
            rate = config.final_learning_rate + amplitude * (1 + jnp.cos(jnp.pi * fraction))
        return jnp.where(update < warmup, peak * update / max(1, warmup), rate)

    return schedule


def learning_rates(config: TrainConfig, steps: int) -> np.ndarray:
    """Compute the learning rates of all updates [steps].

    They are data for the training step, so that runs of any length and schedule share its program.
    """
    return np.asarray(jax.jit(jax.vmap(make_schedule(config, steps)))(jnp.arange(steps)))


def make_optimizer(config: TrainConfig, learning_rate: jax.typing.ArrayLike) -> optax.GradientTransformation:
    """Return the optimizer of one update: global-norm clipping, then AdamW."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adamw = optax.adamw(
        lambda count: learning_rate,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=partial(decay_mask, embeddings=config.decay_embeddings),
    )
    return optax.chain(clip, adamw)


def decay_mask(params: Params, *, embeddings: bool = True) -> Params:
    """Return True for parameters with weight decay: matrices, optionally the embeddings."""
    names = WEIGHT_DECAY_PATHS if embeddings else WEIGHT_DECAY_PATHS - {"embedding", "positions"}
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)


def apply_updates(params: Params, updates: Params) -> Params:
    """Add the updates; a zero update keeps the bits of its parameter.

    Plain addition turns −0.0 into +0.0: training at learning rate 0 would change the weights.
    """
    return jax.tree.map(lambda p, u: jnp.where(u == 0, p, p + u), params, updates)
