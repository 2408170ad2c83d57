"""The training run: the same command starts it, resumes it exactly, and finds it finished.

The host stays one step ahead of the device: the metrics of a step are read only after the next one is under way. At a
checkpoint, a hook or a request to stop it catches up first, so that nothing is saved or shown of a step that was not
seen to be sound. Everything a step depends on is the saved state and its number; hence a run that was killed anywhere
ends with bitwise the weights of one that was not. What was measured on the way is recorded, and recorded lines are on
the disk before the checkpoint that vouches for them; early stopping is decided from these lines alone.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from jax_selftrain import hub
from jax_selftrain.config import TrainConfig, yaml_io
from jax_selftrain.config.metadata import Role
from jax_selftrain.distributed import barrier, broadcast_one_to_all, sigterm_handler
from jax_selftrain.distributed.mesh import mesh_context
from jax_selftrain.errors import InputError, Preempted
from jax_selftrain.hub.trees import find_nonfinite
from jax_selftrain.io import atomic
from jax_selftrain.models import Params, init_params
from jax_selftrain.training import checkpoints
from jax_selftrain.training.checkpoints import Checkpointer
from jax_selftrain.training.data import load_batch
from jax_selftrain.training.early_stopping import EarlyStopping
from jax_selftrain.training.flops import throughput
from jax_selftrain.training.hooks import Hook, check_hooks, run_hooks, spec
from jax_selftrain.training.metrics_writer import (
    NO_STEP,
    MetricsWriter,
    open_metrics_writer,
    read_curve,
    write_launch_info,
)
from jax_selftrain.training.run_folder import Run, acquire_run_folder, check_ranges, load_inputs
from jax_selftrain.training.step import (
    Metrics,
    TrainState,
    abstract_program,
    compiled_step,
    export_params,
    init_state,
    make_frozen_base,
    uses_frozen_base,
)
from jax_selftrain.training.wandb_tracker import WandbTracker, check_tracking


def train(config: TrainConfig, *, hooks: Sequence[Hook] = ()) -> Path:
    """Train a model on a corpus.

    Args:
      config: what to train on what, and how. `config.out` is the run folder: new, or that of the same run, which is
        then resumed from its latest checkpoint (or found finished).
      hooks: what to do on the way. The options `eval_…` ask for one that measures; `study.train` makes it of them.

    Returns:
      The run folder; its `model` is the trained model: that of the last step or, with `stop_metric`, of the best.

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
                print(f"{run.folder}: finished already, {_result(run)}; nothing to do")
            return run.folder
        with mesh_context(run.inputs.sharding_rules.mesh):
            _train(run, hooks)
        return run.folder


def _train(run: Run, hooks: Sequence[Hook]) -> None:
    config, rules = run.config, run.inputs.sharding_rules
    steps = config.steps or 1
    if not jax.process_index():
        checkpoints.remove_partial(run.folder)
    barrier("leftovers are cleaned")
    _, (abstract, _), _ = abstract_program(config, rules.mesh)
    run_step = compiled_step(config, run.inputs.model, rules, steps)
    resumed = checkpoints.latest_step(run.folder) is not None
    state = _restore_or_init(run, abstract)
    first = int(state.step)
    done = first if resumed else NO_STEP
    stopping = _early_stopping(run, hooks, done)
    model = hub.model_with_params(config.model, export_params(config, state), rules)
    checkpointer_of = partial(
        Checkpointer, run.folder, config=config, save_model=_model_writer(run), identity=run.run_hash
    )
    with (
        checkpointer_of(keep=config.keep, keep_every=config.keep_every) as checkpointer,
        open_metrics_writer(partial(_make_records, run, done)) as records,
        _sigterm_flag() as stop_requested,
    ):

        def measure(step: int, state: TrainState) -> bool:
            """Call the hooks that are due; whether what they measured asks for a checkpoint."""
            began = time.perf_counter()
            measures = run_hooks(hooks, step, steps, dataclasses.replace(model, params=export_params(config, state)))
            if not measures:
                return False
            if records is not None:
                records.write_eval(step, measures, seconds=time.perf_counter() - began)
            return stopping.update(step, _config_summary(config, measures)) or stopping.should_stop

        def save(state: TrainState) -> None:
            if records is not None:
                records.sync()
            checkpointer.save(state, best=stopping.best)

        if records is not None:
            write_launch_info(run.folder, _environment(run, first))
        if not resumed and measure(0, state):
            save(state)
        unread: tuple[int, Metrics] | None = None
        for step in range(first + 1, (first if stopping.should_stop else steps) + 1):
            state, metrics = run_step(state, load_batch(config, rules, run.rows, step - 1))
            if unread is not None:
                _finalize_step(run, checkpointer, records, *unread)
            unread = (step, metrics)
            stop = stop_requested(step)
            wanted = stop or _checkpoint_due(config, step)
            if wanted or any(hook.is_due(step, steps) for hook in hooks):
                _finalize_step(run, checkpointer, records, *unread)
                unread = None
                wanted |= measure(step, state)
            if wanted:
                save(state)
            if stop:
                checkpointer.wait()
                raise Preempted(f"{run.folder}: stopped and saved after step {step} of {steps}; run again to go on")
            if stopping.should_stop:
                break
        checkpointer.wait()
        checkpointer.prune(stopping.best)
        _export_model(run, state, stopping)


def _checkpoint_due(config: TrainConfig, step: int) -> bool:
    intervals = (config.checkpoint_every, config.keep_every)
    return step == config.steps or any(every and step % every == 0 for every in intervals)


def _early_stopping(run: Run, hooks: Sequence[Hook], done: int) -> EarlyStopping:
    """As it stood after step `done`, from the curve up to there as process 0 reads it."""
    config = run.config
    stopping = EarlyStopping(config.stop_metric, config.patience)
    if config.stop_metric:
        curve = [] if jax.process_index() else read_curve(run.folder, done)
        lost = broadcast_one_to_all(lambda: _rerun_lost_eval(run, hooks, done, curve))
        if lost:
            raise InputError(
                f"{run.folder / 'curve.jsonl'}: its line of step {lost} is gone, and early stopping goes by it; put "
                f"the file back, or delete {run.folder / 'steps'} to train from the start"
            )
        for measures in broadcast_one_to_all(lambda: [_is_shown(config, line) for line in curve]):
            stopping.update(int(measures["step"]), measures)
    if stopping.best is not None:
        checkpoints.check_has_best(checkpoints.step_dir(run.folder / "steps", stopping.best))
    return stopping


def _rerun_lost_eval(run: Run, hooks: Sequence[Hook], done: int, curve: Sequence[Mapping[str, float]]) -> str:
    """The first step up to `done` that was measured and has no line, or nothing."""
    metric, last = run.config.stop_metric, run.config.steps or 1
    there = {line["step"] for line in curve if metric in line}
    measuring = [hook for hook in hooks if metric in hook.metric_names]
    steps = (step for step in range(done + 1) if any(hook.is_due(step, last) for hook in measuring))
    return next((str(step) for step in steps if step not in there), "")


def _config_summary(config: TrainConfig, line: Mapping[str, float]) -> dict[str, float]:
    """The measure to stop on as process 0 has it: a decision must not hang on the last bit of each process's own."""
    return broadcast_one_to_all(lambda: _is_shown(config, line)) if config.stop_metric else {}


def _is_shown(config: TrainConfig, line: Mapping[str, float]) -> dict[str, float]:
    return {name: line[name] for name in ("step", config.stop_metric) if name in line}


def _make_records(run: Run, done: int) -> MetricsWriter:
    config = run.config
    tracker = None
    if config.wandb:
        tracker = WandbTracker(config.wandb, run.folder, identity=run.run_hash, config=yaml_io.to_dict(config))
    speed = throughput(config, run.inputs.model, run.inputs.sharding_rules.mesh)
    return MetricsWriter(
        run.folder, done=done, steps=config.steps or 1, log_every=config.log_every, speed=speed, tracker=tracker
    )


def _export_model(run: Run, state: TrainState, stopping: EarlyStopping) -> None:
    """Write the run's model: that of the last step or, where it may stop early, of the best."""
    config, trained = run.config, int(state.step)
    if stopping.best is None:
        _model_writer(run)(run.folder / "model", export_params(config, state), trained)
        return
    params = checkpoints.load_params(
        checkpoints.step_dir(run.folder / "steps", stopping.best),
        rules=run.inputs.sharding_rules,
        preset=config.preset,
        identity=run.run_hash,
    )
    best = {"metric": config.stop_metric, "value": stopping.value, "best_step": stopping.best, "trained_steps": trained}
    metadata = {**_metadata(run, stopping.best), "early_stopping": best}
    hub.save_model(run.folder / "model", run.inputs.raw_config, params, source_ref=config.model, metadata=metadata)


def _restore_or_init(run: Run, abstract: TrainState) -> TrainState:
    """The state to go on from: that of the latest checkpoint, else the beginning."""
    config, rules = run.config, run.inputs.sharding_rules
    folder = checkpoints.latest_step(run.folder)
    if folder is not None:
        state = checkpoints.restore(folder, rules=rules, config=config, abstract=abstract, identity=run.run_hash)
        return (
            state._replace(frozen_base=make_frozen_base(config, _initial_params(run)))
            if uses_frozen_base(config)
            else state
        )
    return init_state(config, run.inputs.model, rules, _initial_params(run), config.steps or 1)


def _initial_params(run: Run) -> Params:
    """The student before training, float32."""
    config, rules = run.config, run.inputs.sharding_rules
    if config.init == "scratch":
        params = init_params(run.inputs.model, config.seed, rules)
    else:
        params = hub.load_model(config.model, rules.mesh, "float32", preset=config.preset).params
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


def _model_writer(run: Run) -> checkpoints.SaveModel:
    config, inputs = run.config, run.inputs

    def save(folder: Path, params: Params, step: int) -> None:
        metadata = _metadata(run, step)
        hub.save_model(folder, inputs.raw_config, params, source_ref=config.model, metadata=metadata)

    return save


def _metadata(run: Run, step: int) -> dict[str, Any]:
    """What the model of a step says about itself."""
    return {"step": step, "steps": run.config.steps, "run": run.run_hash, "fingerprints": run.inputs.fingerprints}


def _result(run: Run) -> str:
    """How a finished run ended, in words."""
    best = atomic.read_json(run.folder / "model" / "model.json")["metadata"].get("early_stopping")
    if best is None:
        return f"after {run.config.steps} steps"
    return f"after {best['trained_steps']} steps, with the model of step {best['best_step']}"


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
