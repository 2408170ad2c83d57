"""One training step: a pure function of (state, batch), the same on one device and on a pod.

Parameters and Adam's moments share one layout and are kept in `param_dtype`; updates are computed in float32. The
gradient of a step is the sum over its micro-batches of *unnormalized* gradients, divided once by the total weight, so
that accumulation equals one big batch even when micro-batches hold different numbers of targets (the usual mean of
means does not).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_selftrain import hub
from jax_selftrain.config import TrainConfig
from jax_selftrain.config.metadata import Role, keep_role
from jax_selftrain.distributed.mesh import mesh_context, xla_options
from jax_selftrain.distributed.sharding import ShardingRules, make_sharding_rules
from jax_selftrain.errors import InputError
from jax_selftrain.models import DecoderConfig, Params, abstract_params, accumulation_dtype, axis_sizes, param_shardings
from jax_selftrain.training.lora import abstract_adapters, apply_adapters, init_adapters, merge_adapters
from jax_selftrain.training.loss import AuxLossWeights, Batch, LossStats, loss_fn
from jax_selftrain.training.optimizer import apply_updates, cast_params, make_optimizer, make_schedule

Metrics = dict[str, jax.Array]
"""`loss` (nats per target), `grad_norm` (before clipping), `learning_rate`, `tokens` (targets): scalars."""


class TrainState(NamedTuple):
    """Everything that a step changes; with the data position (= `step`) it determines the rest of the run."""

    step: jax.Array
    """Updates done, int32 scalar."""
    params: Params
    """What is trained: the weights, or their adapters (`lora.init_adapters`)."""
    optimizer: optax.OptState
    ema_params: Params | None = None
    """Moving average of `params` in float32, where asked for."""
    frozen_base: Params | None = None
    """The student before training, where adapters stand on it or the loss looks back at it; never changed."""


StepFunction = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def init_state(
    config: TrainConfig, model: DecoderConfig, rules: ShardingRules, params: Params, steps: int = 1
) -> TrainState:
    """The state before the first step; moments lie as their parameters do.

    Args:
      config: the run's options.
      model, rules: where adapters are to lie.
      params: the student before training, float32.
      steps: of the run; only the learning rate depends on it.
    """
    trained = init_adapters(config, model, rules) if config.lora_rank else params

    return jax.jit(_init, static_argnums=(0, 1))(jit_key(config), steps, trained, params)


def _init(config: TrainConfig, steps: int, trained: Params, params: Params) -> TrainState:
    average = jax.tree.map(jnp.copy, trained) if config.ema_decay else None
    base = make_frozen_base(config, params) if uses_frozen_base(config) else None
    stored = cast_params(trained, config.param_dtype, None)
    moments = make_optimizer(config, steps).init(stored)
    return TrainState(jnp.zeros((), jnp.int32), stored, moments, average, base)


def make_frozen_base(config: TrainConfig, params: Params) -> Params:
    """The student before training as the state holds it: a copy, in the type of the weights."""
    return _base(jit_key(config), params)


@partial(jax.jit, static_argnums=0)
def _base(config: TrainConfig, params: Params) -> Params:
    return jax.tree.map(jnp.copy, cast_params(params, config.param_dtype, None))


def uses_frozen_base(config: TrainConfig) -> bool:
    """Whether training keeps the student before training."""
    return bool(config.lora_rank or config.kl_weight)


def export_params(config: TrainConfig, state: TrainState) -> Params:
    """The model that a run would deliver at this state: averaged where asked, adapters added up, float32."""
    if exports_raw_params(config):
        return state.params
    return _deliver(jit_key(config), state.params if state.ema_params is None else state.ema_params, state.frozen_base)


def exports_raw_params(config: TrainConfig) -> bool:
    """Whether what is trained is what a run would deliver, as it is."""
    return not config.lora_rank and not config.ema_decay and config.param_dtype == "float32"


@partial(jax.jit, static_argnums=0)
def _deliver(config: TrainConfig, params: Params, base: Params | None) -> Params:
    params, base = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, base))
    return merge_adapters(config, base, params) if config.lora_rank and base is not None else params


def jit_key(config: TrainConfig) -> TrainConfig:
    """The options that a run's programs depend on, the others as by default: runs alike in them share what is compiled.

    A study trains many students alike, and tracing a step takes longer than some of them need to train.
    """
    return replace(keep_role(config, Role.COMPILED), seed=config.seed if config.stochastic_rounding else 0)


def compiled_step(config: TrainConfig, model: DecoderConfig, rules: ShardingRules, steps: int) -> StepFunction:
    """`make_step` under `jax.jit`, on this process's devices; the state is donated."""
    return _compiled_step(jit_key(config), model, rules, steps)


@lru_cache(maxsize=8)
def _compiled_step(config: TrainConfig, model: DecoderConfig, rules: ShardingRules, steps: int) -> StepFunction:
    return jax.jit(make_step(config, model, rules, steps), donate_argnums=0, compiler_options=xla_options())


def make_step(config: TrainConfig, model: DecoderConfig, rules: ShardingRules, steps: int) -> StepFunction:
    """The step function of a run of `steps` steps; its batch has a leading axis of `grad_accum` micro-batches."""
    optimizer = make_optimizer(config, steps)
    schedule = make_schedule(config, steps)
    compute_dtype = jnp.dtype(config.dtype)
    penalties = AuxLossWeights(config.z_loss, config.kl_weight)

    def micro_loss(trained: Params, base: Params | None, batch: Batch) -> tuple[jax.Array, LossStats]:
        params = trained if base is None or not config.lora_rank else apply_adapters(config, base, trained)
        return loss_fn(
            model,
            rules,
            params,
            batch,
            base=base if config.kl_weight else None,
            penalties=penalties,
            compute_dtype=compute_dtype,
            remat=config.remat,
        )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        wide = accumulation_dtype(compute_dtype)

        def accumulate(carry: tuple[Params, LossStats], micro: Batch) -> tuple[tuple[Params, LossStats], None]:
            found = jax.grad(micro_loss, has_aux=True)(state.params, state.frozen_base, micro)
            return jax.tree.map(lambda total, part: total + part.astype(total.dtype), carry, found), None

        zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, wide), state.params)
        (gradient, sums), _ = jax.lax.scan(accumulate, (zeros, LossStats.zero(wide)), batch)
        weight = jnp.where(sums.weight > 0, sums.weight, 1.0)  # a batch of padding alone teaches nothing
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        params, moments = _upcast((state.params, state.optimizer), wide)
        updates, moments = optimizer.update(gradient, moments, params)
        params = apply_updates(params, updates)
        average = state.ema_params
        if average is not None:
            average = jax.tree.map(lambda a, p: a + (1 - config.ema_decay) * (p - a), average, params)
        key = jax.random.fold_in(jax.random.key(config.seed), state.step) if config.stochastic_rounding else None
        params, moments = cast_params((params, moments), config.param_dtype, key)
        metrics = {
            "loss": sums.loss / weight,
            "grad_norm": optax.tree.norm(gradient),
            "learning_rate": schedule(state.step),
            "tokens": sums.tokens,
        }
        metrics |= {"kl": sums.kl / weight} if config.kl_weight else {}
        metrics |= {"squared_log_z": sums.z / weight} if config.z_loss else {}
        return TrainState(state.step + 1, params, moments, average, state.frozen_base), metrics

    return train_step


def _upcast(tree: Any, dtype: jnp.dtype) -> Any:
    """Floating-point leaves in the type that updates are computed in."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


def abstract_state(config: TrainConfig, model: DecoderConfig, rules: ShardingRules, steps: int) -> TrainState:
    """Shapes, types and shardings of the state, without any array: to compile for, and to restore into."""
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_params(model),
        param_shardings(model, rules),
    )
    adapters = abstract_adapters(config, model, rules) if config.lora_rank else None
    with mesh_context(rules.mesh):
        state = jax.eval_shape(partial(_init, config, steps), params if adapters is None else adapters, params)

    def concrete(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(rules.mesh, spec))

    return jax.tree.map(concrete, state)


def abstract_batch(config: TrainConfig, rules: ShardingRules) -> Batch:
    """Shapes, types and shardings of a step's batch `[grad_accum, batch_size / grad_accum, …]`.

    Raises:
      InputError: the batch does not divide into micro-batches and replicas; names the sizes that do.
    """
    unit = config.grad_accum * rules.data_parallelism
    if config.batch_size % unit:
        below = config.batch_size // unit * unit
        legal = ", ".join(str(size) for size in (below, below + unit, below + 2 * unit) if size)
        raise InputError(
            f"--batch-size {config.batch_size} does not divide into {config.grad_accum} micro-batches (--grad-accum) "
            f"over {rules.data_parallelism} devices (--mesh data={rules.data_parallelism}): "
            f"it must be a multiple of {unit}, for instance {legal}"
        )
    shape = (config.grad_accum, config.batch_size // config.grad_accum)
    sharding = rules.sharding((None, "batch", None))

    shapes = (
        (config.seq_len + 1, "int32"),
        (config.seq_len, "int32"),
        (config.seq_len, "int32"),
        (config.seq_len, "float32"),
    )
    leaves: list[Any] = [jax.ShapeDtypeStruct((*shape, length), dtype, sharding=sharding) for length, dtype in shapes]
    return Batch(*leaves)


def abstract_program(config: TrainConfig, mesh: Mesh) -> tuple[StepFunction, tuple[TrainState, Batch], tuple[int, ...]]:
    """What training runs, to be compiled here or ahead of time for another machine.

    Args:
      config: the run's options. Only the learning rate depends on the number of steps; where `steps` is unset
        (planning without a corpus) 1 stands in.
      mesh: the global mesh.

    Returns:
      (step function, abstract (state, batch) with shardings, indices of the donated arguments), for
      `jax.jit(function, donate_argnums=donation).lower(*arguments)` inside `using(mesh)`.

    Raises:
      InputError: the model's config cannot be read, or the mesh divides neither model nor batch.
    """
    model, _ = hub.read_config(config.model)
    rules = make_sharding_rules(config.preset, mesh, axis_sizes(model))
    steps = config.steps or 1
    arguments = (abstract_state(config, model, rules, steps), abstract_batch(config, rules))
    return make_step(config, model, rules, steps), arguments, (0,)
