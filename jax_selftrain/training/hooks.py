"""Hooks: functions to call at chosen steps, for instance an evaluation.

Training does not depend on scoring. A hook declares its metrics beforehand, so that a run can be refused before it
starts and recognized when it resumes; its metrics go to `curve.jsonl`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax_selftrain.config import TrainConfig, yaml_io
from jax_selftrain.config.metadata import Role, fields_with_role
from jax_selftrain.errors import InputError
from jax_selftrain.hub import LoadedModel

_EVAL_INPUTS = tuple(
    name for name in fields_with_role(TrainConfig, Role.INPUT) if name in fields_with_role(TrainConfig, Role.EVALUATION)
)


@dataclass(frozen=True)
class Hook:
    """A function to call at chosen steps of a run.

    The function receives the number of updates and the current model, before the checkpoint of that step is written. A
    resumed run may call it again for the same step. It must not keep the model, whose arrays are donated to the next
    step. It may return finite numbers by name, which become a line of `curve.jsonl`.
    """

    function: Callable[[int, LoadedModel], Mapping[str, float] | None]
    steps: tuple[int, ...] = ()
    """Numbers of updates after which to call it; 0 is before the first."""
    every: int | None = None
    """Number of updates between calls."""
    each_epoch: bool = False
    """Call it after each epoch of a run with `epochs`."""
    run_at_start_and_end: bool = False
    """Call it before the first update and after the last, too."""
    metric_names: tuple[str, ...] = ()
    """Names of the numbers that it returns."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """Description of the evaluation with the fingerprints of its inputs, as plain data.

    It is stored in `run.json`; a resumed run must have the same."""

    def is_due(self, step: int, last: int) -> bool:
        """Return True if it is due after `step` of `last` updates."""
        if step in self.steps or (self.run_at_start_and_end and step in (0, last)):
            return True
        return self.every is not None and step > 0 and step % self.every == 0


def run_hooks(hooks: Sequence[Hook], step: int, last: int, model: LoadedModel) -> dict[str, float]:
    """Call the due hooks; return their metrics, which must be finite."""
    metrics: dict[str, float] = {}
    for hook in hooks:
        if not hook.is_due(step, last):
            continue
        for name, value in (hook.function(step, model) or {}).items():
            if name in metrics or name == "step":
                raise ValueError(f"two hooks measure {name!r}, or the name is reserved")
            if not math.isfinite(value):
                raise InputError(f"{name} is {value} after step {step}; nothing of it was saved")
            metrics[name] = float(value)
    return metrics


def check_hooks(config: TrainConfig, hooks: Sequence[Hook]) -> None:
    """Refuse `eval_every` without a hook that measures."""
    if config.eval_every is not None and not any(hook.metric_names for hook in hooks):
        raise InputError("eval_every is set, but nothing measures: call `jax_selftrain.train`, or pass a Hook")


def check_evaluation(config: TrainConfig) -> None:
    """Refuse incomplete evaluation options."""
    given = [name for name in (*_EVAL_INPUTS, "eval_limit") if getattr(config, name) not in ("", (), None)]
    if config.eval_every is None and config.epochs is None and given:
        raise InputError(
            f"{yaml_io.flag(given[0])} needs --eval-every, the number of steps between two evaluations, or --epochs"
        )
    if config.eval_split != "all" and not (config.eval_texts or config.eval_tasks):
        raise InputError(
            f"--eval-split {config.eval_split}: needs --eval-texts or --eval-tasks, whose items it selects"
        )
    if config.best_epoch and not (config.epochs and config.eval_tasks and config.eval_split == "dev"):
        raise InputError("--best-epoch is chosen on dev items; it needs --epochs, --eval-tasks and --eval-split dev")
    if config.best_epoch and config.eval_every is not None:
        raise InputError("--best-epoch needs an evaluation after each epoch; remove --eval-every")
    if config.eval_every is not None and not set(given) & set(_EVAL_INPUTS):
        flags = ", ".join(yaml_io.flag(name) for name in _EVAL_INPUTS)
        raise InputError(f"--eval-every {config.eval_every}: nothing to evaluate; name files with one of {flags}")
