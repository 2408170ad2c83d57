"""The training run, which the same command starts and resumes exactly.

The host is one step ahead of the device: it reads the metrics of a step after it has dispatched the next one. Before a
checkpoint, a hook or a stop it reads all metrics, so that it never saves a state whose loss is not finite. A step is a
function of the saved state and its index, so that a killed run ends with bitwise the weights of an uninterrupted one.
Records are flushed to disk before the checkpoint that implies them.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental import multihost_utils

from jax_selftrain import hub
from jax_selftrain.config import TrainConfig, yaml_io
from jax_selftrain.config.metadata import Role
from jax_selftrain.distributed import barrier, sigterm_handler
from jax_selftrain.distributed.mesh import mesh_context
from jax_selftrain.errors import InputError, Preempted
from jax_selftrain.hub.orbax_io import find_nonfinite
from jax_selftrain.models import Params, init_params
from jax_selftrain.training import checkpoints
from jax_selftrain.training.checkpoints import Checkpointer
from jax_selftrain.training.data import load_batch
from jax_selftrain.training.flops import make_throughput
from jax_selftrain.training.hooks import Hook, check_hooks, run_hooks
from jax_selftrain.training.metrics_writer import (
    NO_STEP,
    MetricsWriter,
    open_metrics_writer,
    write_launch_info,
)
from jax_selftrain.training.run_folder import Run, acquire_run_folder, check_ranges, load_inputs
from jax_selftrain.training.step import (
    Metrics,
    TrainState,
    abstract_state,
    compiled_step,
    export_params,
    init_state,
)
from jax_selftrain.training.wandb_tracker import WandbTracker, check_tracking


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
    check_ranges(config)
    check_hooks(config, hooks)
    check_tracking(config.wandb)
    with acquire_run_folder(load_inputs(config, [hook.measured for hook in hooks if hook.measured])) as run:
        if run.is_finished:
            if not jax.process_index():
                print(f"{run.folder}: already finished, after {run.config.steps} steps; nothing to do")
            return run.folder
        with mesh_context(run.inputs.sharding_rules.mesh):
            _train(run, hooks)
        return run.folder


def _train(run: Run, hooks: Sequence[Hook]) -> None:
    config, rules = run.config, run.inputs.sharding_rules
    steps = config.steps or 1
    if not jax.process_index():
        checkpoints.remove_partial(run.folder)
    barrier("partial checkpoints are removed")
    run_step = compiled_step(config, run.inputs.model, rules, steps)
    resumed = checkpoints.latest_step(run.folder) is not None
    state = _restore_or_init(run)
    first = int(state.step)
    model = hub.model_with_params(run.inputs.source, export_params(config, state), rules)
    save_checkpoint_model = partial(_save_model, run, format="flax")
    with (
        Checkpointer(
            run.folder, config=config, save_model=save_checkpoint_model, identity=run.run_hash
        ) as checkpointer,
        open_metrics_writer(partial(_make_writer, run, first if resumed else NO_STEP)) as writer,
        _watch_sigterm() as should_stop,
    ):

        def evaluate(step: int, state: TrainState) -> None:
            start = time.perf_counter()
            values = run_hooks(hooks, step, steps, dataclasses.replace(model, params=export_params(config, state)))
            if values and writer is not None:
                writer.write_eval(step, values, seconds=time.perf_counter() - start)

        if writer is not None:
            write_launch_info(run.folder, _describe_launch(run, first))
        if not resumed:
            evaluate(0, state)
        unread: tuple[int, Metrics] | None = None
        for step in range(first + 1, steps + 1):
            state, metrics = run_step(state, load_batch(config, rules, run.rows, step - 1))
            if unread is not None:
                _finalize_step(run, checkpointer, writer, *unread)
            unread = (step, metrics)
            stop = should_stop(step)
            is_hook_due = any(hook.is_due(step, steps) for hook in hooks)
            is_save_due = stop or _is_checkpoint_due(config, step)
            if is_hook_due or is_save_due:
                _finalize_step(run, checkpointer, writer, *unread)
                unread = None
            if is_hook_due:
                evaluate(step, state)
            if is_save_due:
                if writer is not None:
                    writer.sync()
                checkpointer.save(state)
            if stop:
                checkpointer.wait()
                raise Preempted(f"{run.folder}: stopped and saved after step {step} of {steps}; run again to resume")
        checkpointer.wait()
        checkpointer.prune()
        _save_model(run, run.folder / "model", export_params(config, state), int(state.step))


def _is_checkpoint_due(config: TrainConfig, step: int) -> bool:
    intervals = (config.checkpoint_every, config.keep_every)
    return step == config.steps or any(every and step % every == 0 for every in intervals)


def _make_writer(run: Run, last_step: int) -> MetricsWriter:
    config = run.config
    tracker = None
    if config.wandb:
        tracker = WandbTracker(config.wandb, run.folder, identity=run.run_hash, config=yaml_io.to_dict(config))
    return MetricsWriter(
        run.folder,
        last_step=last_step,
        steps=config.steps or 1,
        log_every=config.log_every,
        throughput=make_throughput(config, run.inputs.model, run.inputs.sharding_rules.mesh),
        tracker=tracker,
    )


def _restore_or_init(run: Run) -> TrainState:
    """Return the state of the latest checkpoint, or the initial state."""
    config, rules = run.config, run.inputs.sharding_rules
    model, steps = run.inputs.model, config.steps or 1
    folder = checkpoints.latest_step(run.folder)
    if folder is None:
        return init_state(config, model, rules, _initial_params(run), steps)
    abstract = abstract_state(config, model, rules, steps)
    state = checkpoints.restore(folder, rules=rules, config=config, abstract=abstract, identity=run.run_hash)
    return state._replace(frozen_base=_initial_params(run)) if config.lora_rank else state


def _initial_params(run: Run) -> Params:
    """Load or initialize the model before training, float32."""
    config, rules = run.config, run.inputs.sharding_rules
    if config.init == "scratch":
        params = init_params(run.inputs.model, config.seed, rules)
    else:
        params = hub.load_model(run.inputs.source, rules.mesh, "float32", preset=config.preset).params
    broken = find_nonfinite(params)
    if broken is not None:
        raise InputError(f"{config.model}: {broken} holds NaN or infinity; train from another model")
    return params


def _finalize_step(
    run: Run, checkpointer: Checkpointer, writer: MetricsWriter | None, step: int, metrics: Metrics
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


def _save_model(run: Run, folder: Path, params: Params, step: int, *, format: Literal["hf", "flax"] = "hf") -> None:
    """Save a model: `hf` for the result, `flax` for a checkpoint."""
    metadata = {"made_by": "train", "step": step, "steps": run.config.steps, "run": run.run_hash}
    metadata["fingerprints"] = run.inputs.fingerprints
    hub.save_model(folder, params, source=run.inputs.source, metadata=metadata, format=format)


def _describe_launch(run: Run, first: int) -> dict[str, Any]:
    devices = run.inputs.sharding_rules.mesh.devices
    return {
        "from_step": first,
        "options": yaml_io.to_dict(run.config, Role.EXECUTION),
        "mesh": dict(run.inputs.sharding_rules.mesh.shape),
        "device": devices.flat[0].device_kind,
        "processes": jax.process_count(),
    }


@contextmanager
def _watch_sigterm() -> Iterator[Callable[[int], bool]]:
    """Yield a function that tests if training should stop after a step.

    Several processes must stop after the same step; JAX's coordination service, which handles SIGTERM itself, chooses
    it. One process handles SIGTERM here, if training runs in its main thread.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    received = threading.Event()
    with sigterm_handler(received.set):
        yield lambda step: received.is_set()
