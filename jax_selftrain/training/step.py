"""One training step: a pure function of (state, batch), the same on one device and on a pod.

Parameters and Adam's moments are float32 and share one layout; the gradient of a step is the sum over its micro-batches
of *unnormalised* gradients, divided once by the total weight, so that accumulation equals one big batch even when
micro-batches hold different numbers of targets (the usual mean of means does not).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_selftrain import hub
from jax_selftrain.config import TrainConfig
from jax_selftrain.errors import InputError
from jax_selftrain.mesh import Layout, make_layout
from jax_selftrain.models import DecoderConfig, Params, abstract_params, accumulation_dtype, axis_sizes, param_shardings
from jax_selftrain.training.loss import Batch, LossSums, objective
from jax_selftrain.training.optimizer import apply_updates, make_optimizer, make_schedule

Metrics = dict[str, jax.Array]
"""`loss` (nats per target), `grad_norm` (before clipping), `learning_rate`, `tokens` (targets): scalars."""


class TrainState(NamedTuple):
    """Everything that a step changes; with the data position (= `step`) it determines the rest of the run."""

    step: jax.Array
    """Updates done, int32 scalar."""
    params: Params
    optimizer: optax.OptState


StepFunction = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def init_state(optimizer: optax.GradientTransformation, params: Params) -> TrainState:
    """The state before the first step. Under explicit axes the moments inherit the parameters' shardings."""

    @jax.jit
    def fresh(params: Params) -> tuple[jax.Array, optax.OptState]:
        return jnp.zeros((), jnp.int32), optimizer.init(params)

    step, moments = fresh(params)
    return TrainState(step, params, moments)


def make_step(config: TrainConfig, model: DecoderConfig, layout: Layout, steps: int) -> StepFunction:
    """The step function of a run of `steps` steps; its batch has a leading axis of `grad_accum` micro-batches."""
    optimizer = make_optimizer(config, steps)
    schedule = make_schedule(config, steps)
    compute_dtype = jnp.dtype(config.dtype)

    def micro_loss(params: Params, batch: Batch) -> tuple[jax.Array, LossSums]:
        return objective(model, layout, params, batch, compute_dtype=compute_dtype, remat=config.remat)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def accumulate(carry: tuple[Params, LossSums], micro: Batch) -> tuple[tuple[Params, LossSums], None]:
            gradient, sums = jax.grad(micro_loss, has_aux=True)(state.params, micro)
            return jax.tree.map(jnp.add, carry, (gradient, sums)), None

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        (gradient, sums), _ = jax.lax.scan(accumulate, (zeros, LossSums.zero(accumulation_dtype(compute_dtype))), batch)
        weight = jnp.where(sums.weight > 0, sums.weight, 1.0)  # a batch of padding alone teaches nothing
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        metrics = {
            "loss": sums.loss / weight,
            "grad_norm": optax.tree.norm(gradient),
            "learning_rate": schedule(state.step),
            "tokens": sums.tokens,
        }
        return TrainState(state.step + 1, apply_updates(state.params, updates), optimizer_state), metrics

    return train_step


def abstract_state(config: TrainConfig, model: DecoderConfig, layout: Layout, steps: int) -> TrainState:
    """Shapes, types and shardings of the state, without any array: to compile for, and to restore into."""
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_params(model),
        param_shardings(model, layout),
    )
    with jax.set_mesh(layout.mesh):
        state = jax.eval_shape(lambda p: init_state(make_optimizer(config, steps), p), params)

    def concrete(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(layout.mesh, spec))

    return jax.tree.map(concrete, state)


def abstract_batch(config: TrainConfig, layout: Layout) -> Batch:
    """Shapes, types and shardings of a step's batch `[grad_accum, batch_size / grad_accum, …]`.

    Raises:
      InputError: the batch does not divide into micro-batches and replicas; names the sizes that do.
    """
    unit = config.grad_accum * layout.data
    if config.batch_size % unit:
        below = config.batch_size // unit * unit
        legal = ", ".join(str(size) for size in (below, below + unit, below + 2 * unit) if size)
        raise InputError(
            f"--batch-size {config.batch_size} does not divide into {config.grad_accum} micro-batches (--grad-accum) "
            f"over {layout.data} devices (--mesh data={layout.data}): it must be a multiple of {unit}, "
            f"for instance {legal}"
        )
    shape = (config.grad_accum, config.batch_size // config.grad_accum)
    sharding = layout.sharding((None, "batch", None))

    shapes = (
        (config.seq_len + 1, "int32"),
        (config.seq_len, "int32"),
        (config.seq_len, "int32"),
        (config.seq_len, "float32"),
    )
    leaves: list[Any] = [jax.ShapeDtypeStruct((*shape, length), dtype, sharding=sharding) for length, dtype in shapes]
    return Batch(*leaves)


def program(config: TrainConfig, mesh: Mesh) -> tuple[StepFunction, tuple[TrainState, Batch], tuple[int, ...]]:
    """What training runs, to be compiled here or ahead of time for another machine.

    Args:
      config: the run's options. Only the learning rate depends on the number of steps; where `steps` is unset
        (planning without a corpus) 1 stands in.
      mesh: the global mesh.

    Returns:
      (step function, abstract (state, batch) with shardings, indices of the donated arguments), for
      `jax.jit(function, donate_argnums=donation).lower(*arguments)` inside `jax.set_mesh(mesh)`.

    Raises:
      InputError: the model's config cannot be read, or the mesh divides neither model nor batch.
    """
    model, _ = hub.read_config(config.model)
    layout = make_layout(config.preset, mesh, axis_sizes(model))
    steps = config.steps or 1
    arguments = (abstract_state(config, model, layout, steps), abstract_batch(config, layout))
    return make_step(config, model, layout, steps), arguments, (0,)
