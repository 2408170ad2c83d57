"""The training run: the same command starts it, resumes it exactly, and finds it finished.

The host stays one step ahead of the device: the metrics of a step are read only after the next one is under way. At a
checkpoint, a hook or a request to stop it catches up first, so that nothing is saved or shown of a step that was not
seen to be sound. Everything a step depends on is the saved state and its number; hence a run that was killed anywhere
ends with bitwise the weights of one that was not.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from jax_selftrain import hub
from jax_selftrain.config import TrainConfig
from jax_selftrain.errors import InputError, Stopped
from jax_selftrain.hub import LoadedModel
from jax_selftrain.models import Params, init_params
from jax_selftrain.training import checkpoints
from jax_selftrain.training.checkpoints import Checkpointer, first_not_finite
from jax_selftrain.training.data import load_batch
from jax_selftrain.training.optimizer import make_optimizer
from jax_selftrain.training.records import RunRecords, open_records, record_launch
from jax_selftrain.training.run_folder import CHANGEABLE, Run, barrier, claim, read_inputs
from jax_selftrain.training.step import Metrics, TrainState, init_state, program


@dataclass(frozen=True)
class Hook:
    """Something to do at chosen steps, handed in by whoever trains (evaluate, extract, …).

    It is called with the number of updates done and the model as it then is, before the checkpoint of that step is
    written; after a kill it may be called again for the same step. It must not keep the model: its arrays are reused.
    """

    function: Callable[[int, LoadedModel], None]
    steps: tuple[int, ...] = ()
    """After these many updates; 0 is before the first."""
    every: int | None = None
    """After every so many updates."""

    def due(self, step: int) -> bool:
        """Whether to call it after `step` updates."""
        return step in self.steps or (self.every is not None and step > 0 and step % self.every == 0)


def train(config: TrainConfig, *, hooks: Sequence[Hook] = ()) -> Path:
    """Train a model on a corpus.

    Args:
      config: what to train on what, and how. `config.out` is the run folder: new, or that of the same run, which is
        then resumed from its latest checkpoint (or found finished).
      hooks: what to do on the way.

    Returns:
      The run folder; its `model` is the trained model.

    Raises:
      InputError: the inputs cannot be used, the folder is another run's, a checkpoint is damaged, or the loss is not
        finite; what was saved before stays.
      UnavailableError: another process trains in the same folder.
      Stopped: SIGTERM came; the state was saved.
    """
    with claim(read_inputs(config)) as run:
        if run.finished:
            if not jax.process_index():
                print(f"{run.folder}: finished already, after {run.config.steps} steps; nothing to do")
            return run.folder
        with jax.set_mesh(run.inputs.layout.mesh):
            _train(run, hooks)
        return run.folder


def _train(run: Run, hooks: Sequence[Hook]) -> None:
    config, layout = run.config, run.inputs.layout
    steps, every = config.steps or 1, config.checkpoint_every or 1
    if not jax.process_index():
        checkpoints.clean(run.folder)
    barrier("leftovers are cleaned")
    function, (abstract, _), donation = program(config, layout.mesh)
    run_step = jax.jit(function, donate_argnums=donation)
    state = _begin(run, abstract)
    first = int(state.step)
    model = hub.with_params(config.model, state.params, layout)
    save_model = _model_writer(run)
    with (
        Checkpointer(run.folder, save_model=save_model, identity=run.identity, keep=config.keep) as checkpointer,
        open_records(run.folder, step=first, steps=steps, log_every=config.log_every) as records,
        _stop_requests() as stop_requested,
    ):
        if records is not None:
            record_launch(run.folder, _launch_facts(run, first))
        if first == 0:
            _call(hooks, 0, model, state)
        unread: tuple[int, Metrics] | None = None
        for step in range(first + 1, steps + 1):
            state, metrics = run_step(state, load_batch(config, layout, run.rows, step - 1))
            if unread is not None:
                _settle(run, checkpointer, records, *unread)
            unread = (step, metrics)
            stop = stop_requested(step)
            save = stop or step == steps or step % every == 0
            if save or any(hook.due(step) for hook in hooks):
                _settle(run, checkpointer, records, *unread)
                unread = None
                _call(hooks, step, model, state)
            if save:
                if records is not None:
                    records.sync()
                checkpointer.save(state)
            if stop:
                checkpointer.wait()
                raise Stopped(f"{run.folder}: stopped and saved after step {step} of {steps}; run again to go on")
        checkpointer.wait()
        save_model(run.folder / "model", state.params, steps)


def _begin(run: Run, abstract: TrainState) -> TrainState:
    """The state to go on from: that of the latest checkpoint, else the beginning."""
    config, layout = run.config, run.inputs.layout
    folder = checkpoints.newest(run.folder)
    if folder is not None:
        return checkpoints.restore(
            folder, layout=layout, preset=config.preset, abstract=abstract, identity=run.identity
        )
    if config.init == "scratch":
        params = init_params(run.inputs.model, config.seed, layout)
    else:
        params = hub.load_model(config.model, layout.mesh, "float32", preset=config.preset).params
    broken = first_not_finite(params)
    if broken is not None:
        raise InputError(f"{config.model}: its {broken} holds NaN or infinity; there is nothing to train from")
    return init_state(make_optimizer(config, config.steps or 1), params)


def _settle(run: Run, checkpointer: Checkpointer, records: RunRecords | None, step: int, metrics: Metrics) -> None:
    """Wait for the metrics of a step, refuse them if they are not finite, else record them."""
    values = {name: value.item() for name, value in jax.device_get(metrics).items()}
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            checkpointer.wait()
            last = checkpoints.newest(run.folder)
            kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint before it"
            raise InputError(
                f"{run.folder}: {name} is {values[name]} at step {step}; nothing of it was saved, {kept}; train into "
                f"another --out with a lower --learning-rate (now {run.config.learning_rate:g}) or more --warmup-ratio"
            )
    if records is not None:
        records.write(step, values)


def _call(hooks: Sequence[Hook], step: int, model: LoadedModel, state: TrainState) -> None:
    for hook in hooks:
        if hook.due(step):
            hook.function(step, dataclasses.replace(model, params=state.params))


def _model_writer(run: Run) -> checkpoints.SaveModel:
    config, inputs = run.config, run.inputs

    def save(folder: Path, params: Params, step: int) -> None:
        metadata = {"step": step, "steps": config.steps, "run": run.identity, "fingerprints": inputs.fingerprints}
        hub.save_model(folder, inputs.raw_config, params, source_ref=config.model, metadata=metadata)

    return save


def _launch_facts(run: Run, first: int) -> dict[str, Any]:
    devices = run.inputs.layout.mesh.devices
    return {
        "from_step": first,
        "options": {name: getattr(run.config, name) for name in CHANGEABLE},
        "mesh": dict(run.inputs.layout.mesh.shape),
        "device": devices.flat[0].device_kind,
        "processes": jax.process_count(),
    }


@contextmanager
def _stop_requests() -> Iterator[Callable[[int], bool]]:
    """While inside, SIGTERM is a request: yields a function that tells, after a step, whether one came.

    Several processes must stop after the same step; JAX's coordination service agrees on one (it listens to SIGTERM
    itself). Signals reach the main thread only, so that a run in another thread is simply not told.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    requested = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda number, frame: requested.set())
    try:
        yield lambda step: requested.is_set()
    finally:
        signal.signal(signal.SIGTERM, previous)
