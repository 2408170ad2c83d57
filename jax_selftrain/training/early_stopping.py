"""Early stopping on a measure of the curve: which step was best, and when to give up waiting for a better one.

Its whole state is a function of `curve.jsonl`, which is cut to the restored step when a run goes on; so there is
nothing to save, and a run that was killed stops at the same step with the same model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax_selftrain.errors import InputError

LOWER_IS_BETTER = {
    "nll": True,
    "perplexity": True,
    "loss": True,
    "acc": False,
    "acc_norm": False,
    "exact_match": False,
    "log_pz": False,
    "pz": False,
}
"""By the last part of a measure's name, after the `/`."""


def check_metric(metric: str, measures: Sequence[str]) -> None:
    """Refuse a measure that is not among those of the run, or of which it is not known whether lower is better.

    Raises:
      InputError: lists what there is.
    """
    known = [name for name in measures if _metric_kind(name) in LOWER_IS_BETTER]
    if metric not in known:
        raise InputError(
            f"--stop-metric {metric}: this run can stop on {', '.join(known) or 'nothing that it measures'}"
        )


class EarlyStopping:
    """Follows one measure (or none: then nothing is ever best, and nothing stops)."""

    def __init__(self, metric: str, patience: int):
        """Stop after `patience` evaluations in a row that are not better than the best before them."""
        self._metric, self._patience, self._waited = metric, patience, 0
        self.best: int | None = None
        """The step of the best evaluation so far; of equal ones the first."""
        self.value: float | None = None
        """The measure at that step."""

    @property
    def should_stop(self) -> bool:
        """Whether patience has run out."""
        return self._waited >= self._patience

    def update(self, step: int, measures: Mapping[str, float]) -> bool:
        """Take note of an evaluation; whether it is the best so far."""
        if self._metric not in measures:
            return False
        value = measures[self._metric]
        if self.value is None or (
            value < self.value if LOWER_IS_BETTER[_metric_kind(self._metric)] else value > self.value
        ):
            self.best, self.value, self._waited = step, value, 0
            return True
        self._waited += 1
        return False


def _metric_kind(measure: str) -> str:
    return measure.rpartition("/")[2]
