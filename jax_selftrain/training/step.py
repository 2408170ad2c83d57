"""The training step: a pure function of (state, batch) on any mesh.

Parameters and Adam's moments are float32 and have one sharding. The gradient of a step is the sum of the unnormalized
gradients of its micro-batches, divided once by the total weight. Gradient accumulation then equals one large batch even
if micro-batches have different numbers of targets; a mean of means does not.
"""

from collections.abc import Callable
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
from jax_selftrain.models import DecoderConfig, Params, abstract_params, axis_sizes
from jax_selftrain.models.matmul import accumulation_dtype
from jax_selftrain.training.lora import abstract_adapters, apply_adapters, init_adapters, merge_adapters
from jax_selftrain.training.loss import Batch, LossStats, loss_fn
from jax_selftrain.training.optimizer import apply_updates, make_optimizer

Metrics = dict[str, jax.Array]
"""Scalars: `loss` (nats per target), `grad_norm` (before clipping), `learning_rate`, `tokens` (targets)."""


class TrainState(NamedTuple):
    """Training state; `step` is also the position in the data."""

    step: jax.Array
    """Number of updates so far, int32 scalar."""
    params: Params
    """Trained parameters: the weights, or the LoRA adapters (`lora.init_adapters`)."""
    opt_state: optax.OptState
    frozen_base: Params | None = None
    """Weights below the adapters, constant; None without LoRA."""


StepFunction = Callable[[TrainState, Batch, jax.typing.ArrayLike], tuple[TrainState, Metrics]]
"""The third argument is the learning rate, a scalar."""


def init_state(config: TrainConfig, model: DecoderConfig, rules: ShardingRules, params: Params) -> TrainState:
    """Create the sharded state before the first step.

    The state takes over `params`, the student before training, float32.
    """
    trained = init_adapters(config, model, rules) if config.lora_rank else params
    return jax.jit(_init, static_argnums=0)(jit_key(config), trained, params)


def _init(config: TrainConfig, trained: Params, params: Params) -> TrainState:
    opt_state = make_optimizer(config, 0.0).init(trained)
    return TrainState(jnp.zeros((), jnp.int32), trained, opt_state, params if config.lora_rank else None)


def export_params(config: TrainConfig, state: TrainState) -> Params:
    """Return the float32 model of a state, with adapters merged."""
    if state.frozen_base is None:
        return state.params
    return _merge(jit_key(config), state.frozen_base, state.params)


_merge = jax.jit(merge_adapters, static_argnums=0)


def jit_key(config: TrainConfig) -> TrainConfig:
    """Replace the options that no compiled program depends on by their defaults.

    Runs with the same key share compiled programs: for a small student of a study, tracing a step takes longer than
    its training.
    """
    return keep_role(config, Role.COMPILED)


@lru_cache(maxsize=8)
def compiled_step(config: TrainConfig, model: DecoderConfig, rules: ShardingRules) -> StepFunction:
    """Return `make_step` under `jax.jit`; it donates the state. `config` is a `jit_key`."""
    return jax.jit(make_step(config, model, rules), donate_argnums=0, compiler_options=xla_options())


def make_step(config: TrainConfig, model: DecoderConfig, rules: ShardingRules) -> StepFunction:
    """Return the step function of a run.

    The leading axis of its batch is `grad_accum` micro-batches.
    """
    compute_dtype = jnp.dtype(config.dtype)

    def micro_loss(trained: Params, base: Params | None, batch: Batch) -> tuple[jax.Array, LossStats]:
        params = trained if base is None else apply_adapters(config, base, trained)
        return loss_fn(model, rules, params, batch, compute_dtype=compute_dtype, remat=config.remat)

    def train_step(state: TrainState, batch: Batch, learning_rate: jax.typing.ArrayLike) -> tuple[TrainState, Metrics]:
        dtype = accumulation_dtype(compute_dtype)

        def accumulate(carry: tuple[Params, LossStats], micro: Batch) -> tuple[tuple[Params, LossStats], None]:
            found = jax.grad(micro_loss, has_aux=True)(state.params, state.frozen_base, micro)
            return jax.tree.map(lambda total, part: total + part.astype(total.dtype), carry, found), None

        zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype), state.params)
        (grads, stats), _ = jax.lax.scan(accumulate, (zeros, LossStats.zero(dtype)), batch)
        weight = jnp.where(stats.weight > 0, stats.weight, 1.0)  # a batch may be padding only
        grads = jax.tree.map(lambda grad: grad / weight, grads)
        updates, opt_state = make_optimizer(config, learning_rate).update(grads, state.opt_state, state.params)
        metrics = {
            "loss": stats.loss / weight,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(learning_rate),
            "tokens": stats.tokens,
        }
        params = apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, state.frozen_base), metrics

    return train_step


def abstract_state(config: TrainConfig, model: DecoderConfig, rules: ShardingRules) -> TrainState:
    """Return the state as shapes, types and shardings."""
    params = abstract_params(model, rules=rules)
    trained = abstract_adapters(config, model, rules) if config.lora_rank else params
    with mesh_context(rules.mesh):
        state = jax.eval_shape(partial(_init, config), trained, params)

    def bind_to_mesh(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(rules.mesh, spec))

    return jax.tree.map(bind_to_mesh, state)


def abstract_batch(config: TrainConfig, rules: ShardingRules) -> Batch:
    """Return a batch, `[grad_accum, batch_size / grad_accum, …]`, as shapes and shardings.

    Raises:
      InputError: the batch does not divide into micro-batches and replicas; suggests sizes that do.
    """
    replicas = rules.data_parallelism
    unit = config.grad_accum * replicas
    if config.batch_size % unit:
        below = config.batch_size // unit * unit
        legal = ", ".join(str(size) for size in (below, below + unit, below + 2 * unit) if size)
        raise InputError(
            f"--batch-size {config.batch_size} does not divide into {config.grad_accum} micro-batches (--grad-accum) "
            f"over {replicas} devices (--mesh data={replicas}): it must be a multiple of {unit}, for instance {legal}"
        )

    def struct(length: int, dtype: str = "int32") -> Any:
        shape = (config.grad_accum, config.batch_size // config.grad_accum, length)
        return rules.abstract_array(shape, dtype, (None, "batch", None))

    length = config.seq_len
    return Batch(struct(length + 1), struct(length), struct(length), struct(length, "float32"))


def abstract_train_step(
    config: TrainConfig, mesh: Mesh
) -> tuple[StepFunction, tuple[TrainState, Batch, jax.ShapeDtypeStruct], tuple[int, ...]]:
    """Return the step function with abstract arguments, to compile it.

    Returns:
      (step function, abstract (state, batch, rate) with shardings, indices of the donated arguments), for
      `jax.jit(function, donate_argnums=donated).lower(*arguments)` inside `mesh_context(mesh)`.

    Raises:
      InputError: the model's config cannot be read, or the mesh does not divide the model or the batch.
    """
    model = hub.open_model(config.model).config
    rules = make_sharding_rules(config.preset, mesh, axis_sizes(model))
    rate = rules.abstract_array((), "float32", ())
    return (
        make_step(config, model, rules),
        (abstract_state(config, model, rules), abstract_batch(config, rules), rate),
        (0,),
    )
