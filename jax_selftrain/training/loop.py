"""The training run, which the same command starts and resumes exactly.

The host is one step ahead of the device: it reads the metrics of a step after it has dispatched the next one. Before a
checkpoint, a hook or a stop it reads all metrics, so that it never saves a state whose loss is not finite. A step is a
function of the saved state and its index, so that a killed run ends with bitwise the weights of an uninterrupted one.
Records are flushed to disk before the checkpoint that implies them.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jax_selftrain import hub
from jax_selftrain.config import TrainConfig, yaml_io
from jax_selftrain.distributed import barrier, broadcast_one_to_all, sigterm_event
from jax_selftrain.distributed.mesh import mesh_context
from jax_selftrain.errors import InputError, Preempted
from jax_selftrain.io import atomic
from jax_selftrain.models import Params, init_params
from jax_selftrain.training import checkpoints
from jax_selftrain.training.checkpoints import Checkpointer
from jax_selftrain.training.data import load_batch
from jax_selftrain.training.hooks import Hook, check_evaluation, check_hooks, run_hooks
from jax_selftrain.training.lora import check_lora
from jax_selftrain.training.metrics_writer import NO_STEP, MetricsWriter, import_wandb
from jax_selftrain.training.optimizer import learning_rates
from jax_selftrain.training.run_folder import Run, acquire_run_folder, load_inputs
from jax_selftrain.training.step import TrainState, abstract_state, compiled_step, export_params, init_state, jit_key


def train(config: TrainConfig, *, hooks: Sequence[Hook] = ()) -> Path:
    """Train a model on a corpus.

    Args:
      config: the run's options. `config.out` is the run folder: a new one, or the folder of the same run, which resumes
        from its latest checkpoint.
      hooks: functions to call at chosen steps; `study.train_with_evals` makes one of the `eval_…` options.

    Returns:
      The run folder; its `model` is the trained model.

    Raises:
      InputError: the inputs cannot be used, the folder holds another run, a checkpoint is damaged, or the loss is not
        finite; earlier checkpoints stay.
      UnavailableError: another process trains in the same folder.
      Preempted: SIGTERM arrived; the state was saved.
    """
    yaml_io.require(config)
    check_train_config(config)
    check_hooks(config, hooks)
    with acquire_run_folder(load_inputs(config, [hook.measured for hook in hooks if hook.measured])) as run:
        if (run.folder / "model").exists():
            if not jax.process_index():
                print(f"{run.folder}: already finished, after {run.config.steps} steps; nothing to do")
            return run.folder
        rates = learning_rates(run.config, run.config.steps or 1)
        with mesh_context(run.inputs.sharding_rules.mesh):
            _train(run, rates, hooks)
        return run.folder


def _train(run: Run, rates: np.ndarray, hooks: Sequence[Hook]) -> None:
    config, rules = run.config, run.inputs.sharding_rules
    steps = config.steps or 1
    if not jax.process_index():
        for folder in (run.folder, run.folder / "checkpoints"):
            atomic.remove_stale_temp_files(folder)
    barrier("partial checkpoints are removed")
    hooks = [dataclasses.replace(hook, steps=run.epoch_ends) if hook.each_epoch else hook for hook in hooks]
    run_step = compiled_step(jit_key(config), run.inputs.source.config, rules)
    resumed = checkpoints.latest_step(run.folder) is not None
    state = _restore_or_init(run)
    first = int(state.step)
    model = hub.LoadedModel(run.inputs.source, export_params(config, state), rules, jnp.dtype(jnp.float32))
    with ExitStack() as stack:
        checkpointer = Checkpointer(run, stack)
        writer = None if jax.process_index() else MetricsWriter(run, first if resumed else NO_STEP, stack)
        should_stop = stack.enter_context(_watch_preemption())

        def evaluate(step: int, state: TrainState) -> None:
            start = time.perf_counter()
            values = run_hooks(hooks, step, steps, dataclasses.replace(model, params=export_params(config, state)))
            if values and writer is not None:
                writer.write_eval(step, values, seconds=time.perf_counter() - start)

        if not resumed:
            evaluate(0, state)
        unread: tuple[int, dict[str, jax.Array]] | None = None
        for step in range(first + 1, steps + 1):
            state, metrics = run_step(state, load_batch(config, rules, run.rows, step - 1), rates[step - 1])
            if unread is not None:
                _finalize_step(run, checkpointer, writer, *unread)
            unread = (step, metrics)
            stop = should_stop(step)
            is_hook_due = any(hook.is_due(step, steps) for hook in hooks)
            intervals = (steps, config.checkpoint_every, config.keep_every)
            is_save_due = stop or any(every and step % every == 0 for every in intervals)
            is_save_due |= (config.checkpoint_every is None or config.best_epoch) and step in run.epoch_ends
            if is_hook_due or is_save_due:
                _finalize_step(run, checkpointer, writer, *unread)
                unread = None
            if is_hook_due:
                evaluate(step, state)
            if is_save_due:
                checkpointer.save(state, {} if writer is None else writer.sync())
            if stop:
                checkpointer.wait()
                raise Preempted(f"{run.folder}: stopped and saved after step {step} of {steps}; run again to resume")
        checkpointer.wait()
        checkpointer.prune()
        step, params = int(state.step), export_params(config, state)
        if config.best_epoch:
            step = broadcast_one_to_all(lambda: checkpoints.best_step(checkpoints.read_curve(run.folder)))
            best = run.folder / "checkpoints" / f"{step:06d}" / "model"
            params = hub.load_model(best, rules.mesh, "float32", preset=config.preset).params
        checkpoints.save_run_model(run, run.folder / "model", params, step, "hf")


def _restore_or_init(run: Run) -> TrainState:
    """Return the state of the latest checkpoint, or the initial state."""
    config, rules = run.config, run.inputs.sharding_rules
    model = run.inputs.source.config
    folder = checkpoints.latest_step(run.folder)
    if folder is None:
        return init_state(config, model, rules, _initial_params(run))
    state = checkpoints.restore(folder, run, abstract_state(config, model, rules))
    return state._replace(frozen_base=_initial_params(run)) if config.lora_rank else state


def _initial_params(run: Run) -> Params:
    """Load or initialize the model before training, float32."""
    config, rules = run.config, run.inputs.sharding_rules
    if config.init == "scratch":
        return init_params(run.inputs.source.config, config.seed, rules)
    return hub.load_model(run.inputs.source, rules.mesh, "float32", preset=config.preset).params


def _finalize_step(
    run: Run, checkpointer: Checkpointer, writer: MetricsWriter | None, step: int, metrics: dict[str, jax.Array]
) -> None:
    """Wait for the metrics of a step, check and record them."""
    values = {name: value.item() for name, value in jax.device_get(metrics).items()}
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            checkpointer.wait()
            last = checkpoints.latest_step(run.folder)
            kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint before it"
            raise InputError(
                f"{run.folder}: {name} is {values[name]} at step {step}; nothing of it was saved, {kept}; train into "
                f"another --out with a lower --learning-rate (now {run.config.learning_rate:g}) or more --warmup-ratio"
            )
    if writer is not None:
        writer.write(step, values)


@contextmanager
def _watch_preemption() -> Iterator[Callable[[int], bool]]:
    """Yield a function that tests if training should stop after a step.

    Several processes must stop after the same step; JAX's coordination service, which handles SIGTERM itself, chooses
    it.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    with sigterm_event() as received:
        yield lambda step: received.is_set()


def check_train_config(config: TrainConfig) -> None:
    """Refuse options that fit no model and corpus."""
    if config.steps is not None and config.epochs is not None:
        raise InputError("--steps and --epochs exclude each other; give one of them")
    check_evaluation(config)
    check_lora(config)
    if config.wandb:
        import_wandb()
