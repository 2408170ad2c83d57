"""The training run: the same command starts it, resumes it exactly, and finds it finished.

The host stays one step ahead of the device: the metrics of a step are read only after the next one is under way. At a
checkpoint, a hook or a request to stop it catches up first, so that nothing is saved or shown of a step that was not
seen to be sound. Everything a step depends on is the saved state and its number; hence a run that was killed anywhere
ends with bitwise the weights of one that was not. What was measured on the way is recorded, and recorded lines are on
the disk before the checkpoint that vouches for them.
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
from jax_selftrain.training.flops import throughput
from jax_selftrain.training.hooks import Hook, check_hooks, run_hooks, spec
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
    abstract_train_step,
    compiled_step,
    export_params,
    init_state,
)
from jax_selftrain.training.wandb_tracker import WandbTracker, check_tracking


def train(config: TrainConfig, *, hooks: Sequence[Hook] = ()) -> Path:
    """Train a model on a corpus.

    Args:
      config: what to train on what, and how. `config.out` is the run folder: new, or that of the same run, which is
        then resumed from its latest checkpoint (or found finished).
      hooks: what to do on the way. The options `eval_…` ask for one that measures; `study.train` makes it of them.

    Returns:
      The run folder; its `model` is the trained model.

    Raises:
      InputError: the inputs cannot be used, the folder is another run's, a checkpoint is damaged, or the loss is not
        finite; what was saved before stays.
      UnavailableError: another process trains in the same folder.
      Stopped: SIGTERM came; the state was saved.
    """
    check_ranges(config)
    check_hooks(config, hooks)
    check_tracking(config.wandb)
    with acquire_run_folder(load_inputs(config, spec(hooks))) as run:
        if run.finished:
            if not jax.process_index():
                print(f"{run.folder}: finished already, after {run.config.steps} steps; nothing to do")
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
    _, (abstract, _), _ = abstract_train_step(config, rules.mesh)
    run_step = compiled_step(config, run.inputs.model, rules, steps)
    resumed = checkpoints.latest_step(run.folder) is not None
    state = _restore_or_init(run, abstract)
    first = int(state.step)
    model = hub.model_with_params(run.inputs.source, export_params(config, state), rules)
    save_checkpoint_model = partial(_save_model, run, format="flax")
    with (
        Checkpointer(
            run.folder, config=config, save_model=save_checkpoint_model, identity=run.run_hash
        ) as checkpointer,
        open_metrics_writer(partial(_make_records, run, first if resumed else NO_STEP)) as records,
        _sigterm_flag() as stop_requested,
    ):

        def evaluate(step: int, state: TrainState) -> None:
            began = time.perf_counter()
            measures = run_hooks(hooks, step, steps, dataclasses.replace(model, params=export_params(config, state)))
            if measures and records is not None:
                records.write_eval(step, measures, seconds=time.perf_counter() - began)

        if records is not None:
            write_launch_info(run.folder, _environment(run, first))
        if not resumed:
            evaluate(0, state)
        unread: tuple[int, Metrics] | None = None
        for step in range(first + 1, steps + 1):
            state, metrics = run_step(state, load_batch(config, rules, run.rows, step - 1))
            if unread is not None:
                _finalize_step(run, checkpointer, records, *unread)
            unread = (step, metrics)
            stop = stop_requested(step)
            is_hook_due = any(hook.is_due(step, steps) for hook in hooks)
            is_save_due = stop or _checkpoint_due(config, step)
            if is_hook_due or is_save_due:
                _finalize_step(run, checkpointer, records, *unread)
                unread = None
            if is_hook_due:
                evaluate(step, state)
            if is_save_due:
                if records is not None:
                    records.sync()
                checkpointer.save(state)
            if stop:
                checkpointer.wait()
                raise Preempted(f"{run.folder}: stopped and saved after step {step} of {steps}; run again to go on")
        checkpointer.wait()
        checkpointer.prune()
        _save_model(run, run.folder / "model", export_params(config, state), int(state.step))


def _checkpoint_due(config: TrainConfig, step: int) -> bool:
    intervals = (config.checkpoint_every, config.keep_every)
    return step == config.steps or any(every and step % every == 0 for every in intervals)


def _make_records(run: Run, done: int) -> MetricsWriter:
    config = run.config
    tracker = None
    if config.wandb:
        tracker = WandbTracker(config.wandb, run.folder, identity=run.run_hash, config=yaml_io.to_dict(config))
    speed = throughput(config, run.inputs.model, run.inputs.sharding_rules.mesh)
    return MetricsWriter(
        run.folder, done=done, steps=config.steps or 1, log_every=config.log_every, speed=speed, tracker=tracker
    )


def _restore_or_init(run: Run, abstract: TrainState) -> TrainState:
    """Return the state of the latest checkpoint, or the initial state."""
    config, rules = run.config, run.inputs.sharding_rules
    folder = checkpoints.latest_step(run.folder)
    if folder is None:
        return init_state(config, run.inputs.model, rules, _initial_params(run), config.steps or 1)
    state = checkpoints.restore(folder, rules=rules, config=config, abstract=abstract, identity=run.run_hash)
    return state._replace(frozen_base=_initial_params(run)) if config.lora_rank else state


def _initial_params(run: Run) -> Params:
    """The student before training, float32."""
    config, rules = run.config, run.inputs.sharding_rules
    if config.init == "scratch":
        params = init_params(run.inputs.model, config.seed, rules)
    else:
        params = hub.load_model(run.inputs.source, rules.mesh, "float32", preset=config.preset).params
    broken = find_nonfinite(params)
    if broken is not None:
        raise InputError(f"{config.model}: its {broken} holds NaN or infinity; there is nothing to train from")
    return params


def _finalize_step(
    run: Run, checkpointer: Checkpointer, records: MetricsWriter | None, step: int, metrics: Metrics
) -> None:
    """Wait for the metrics of a step, refuse them if they are not finite, else record them."""
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
    if records is not None:
        records.write(step, values)


def _save_model(run: Run, folder: Path, params: Params, step: int, *, format: Literal["hf", "flax"] = "hf") -> None:
    """Write the parameters of a step: safetensors for the final model, an Orbax tree for a checkpoint."""
    metadata = {"made_by": "train", "step": step, "steps": run.config.steps, "run": run.run_hash}
    metadata["fingerprints"] = run.inputs.fingerprints
    hub.save_model(folder, params, source=run.inputs.source, metadata=metadata, format=format)


def _environment(run: Run, first: int) -> dict[str, Any]:
    devices = run.inputs.sharding_rules.mesh.devices
    return {
        "from_step": first,
        "options": yaml_io.to_dict(run.config, Role.EXECUTION),
        "mesh": dict(run.inputs.sharding_rules.mesh.shape),
        "device": devices.flat[0].device_kind,
        "processes": jax.process_count(),
    }


@contextmanager
def _sigterm_flag() -> Iterator[Callable[[int], bool]]:
    """While inside, SIGTERM is a request: yields a function that tells, after a step, whether one came.

    Several processes must stop after the same step; JAX's coordination service agrees on one (it listens to SIGTERM
    itself). Signals reach the main thread only, so that a run in another thread is simply not told.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    requested = threading.Event()
    with sigterm_handler(requested.set):
        yield lambda step: requested.is_set()
