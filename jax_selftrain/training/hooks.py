"""What is to happen at chosen steps of a run, handed in by whoever trains: evaluate, extract, anything.

Training does not know how a model is scored; it knows when to ask, where the answer is written (`curve.jsonl`), and how
to stop on it. A hook that measures says beforehand what it measures, so that a run can be refused before it begins and
recognized when it goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax_selftrain.config import TrainConfig, yaml_io
from jax_selftrain.config.metadata import Role, fields_with_role
from jax_selftrain.errors import InputError
from jax_selftrain.hub import LoadedModel

_EVALUATED = tuple(
    name for name in fields_with_role(TrainConfig, Role.INPUT) if name in fields_with_role(TrainConfig, Role.EVALUATION)
)


@dataclass(frozen=True)
class Hook:
    """Something to do at chosen steps, handed in by whoever trains (evaluate, extract, …).

    It is called with the number of updates done and the model as it then is, before the checkpoint of that step is
    written; after a kill it may be called again for the same step. It must not keep the model: its arrays are reused.
    What it returns, finite numbers by name, becomes a line of `curve.jsonl`.
    """

    function: Callable[[int, LoadedModel], Mapping[str, float] | None]
    steps: tuple[int, ...] = ()
    """After these many updates; 0 is before the first."""
    every: int | None = None
    """After every so many updates."""
    run_at_start_and_end: bool = False
    """Also before the first update and after the last."""
    metric_names: tuple[str, ...] = ()
    """Names of the numbers that it returns."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """What is measured, as plain data with the fingerprints of its inputs: it stands in `run.json`, and a run that
    goes on must measure the same."""

    def is_due(self, step: int, last: int) -> bool:
        """Whether to call it after `step` updates of a run of `last`."""
        if step in self.steps or (self.run_at_start_and_end and step in (0, last)):
            return True
        return self.every is not None and step > 0 and step % self.every == 0


def run_hooks(hooks: Sequence[Hook], step: int, last: int, model: LoadedModel) -> dict[str, float]:
    """Call those that are due, in their order, and gather what they measured.

    Raises:
      InputError: a number is not finite.
    """
    found: dict[str, float] = {}
    for hook in hooks:
        if not hook.is_due(step, last):
            continue
        for name, value in (hook.function(step, model) or {}).items():
            if name in found or name == "step":
                raise ValueError(f"two hooks measure {name!r}, or it is a name of the curve's own")
            if not math.isfinite(value):
                raise InputError(f"{name} is {value} after step {step}; nothing of it was saved")
            found[name] = float(value)
    return found


def spec(hooks: Sequence[Hook]) -> list[Mapping[str, Any]]:
    """What the hooks measure, as plain data; empty where they measure nothing."""
    return [hook.measured for hook in hooks if hook.measured]


def check_hooks(config: TrainConfig, hooks: Sequence[Hook]) -> None:
    """Refuse `eval_every` without a hook that measures.

    Raises:
      InputError: suggests `jax_selftrain.train`, which makes the hook.
    """
    if config.eval_every is not None and not any(hook.metric_names for hook in hooks):
        raise InputError("eval_every is set, but nothing measures: call `jax_selftrain.train`, or hand in a Hook")


def check_evaluation(config: TrainConfig) -> None:
    """Refuse options of the evaluation on the way that do not belong together. Raises InputError naming them."""
    given = [name for name in (*_EVALUATED, "eval_limit") if getattr(config, name) not in ("", (), None)]
    if config.eval_every is None and given:
        raise InputError(f"{yaml_io.flag(given[0])} needs --eval-every: how many steps lie between two evaluations")
    if config.eval_every is not None and not set(given) & set(_EVALUATED):
        flags = ", ".join(yaml_io.flag(name) for name in _EVALUATED)
        raise InputError(f"--eval-every {config.eval_every}: nothing to evaluate; name files with one of {flags}")
