"""What changed between two checkpoints, from the same requests answered by both: effects with 95 % intervals.

All comparisons are *paired*: the same question, document or sequence before and after. Their intervals and p-values
say how the difference would vary over other questions, documents or sequences of the same kind; they speak of **one
pair of checkpoints**. How the difference varies over seeds (other samples, other orders) cannot be seen from one
round, and is often larger: nothing here is a verdict about a recipe.

Intervals of means are Student's t over items. A rate per token (a perplexity's logarithm) is a ratio of two sums over
documents, so its interval treats the *document* as the unit and uses the linearised ratio estimator (Cochran, Sampling
Techniques, §2.11). Shares have Wilson intervals, their paired changes Bonett and Price's (J. Educ. Behav. Stat. 37,
2012: Wald's with one flip added on either side), which does not pretend certainty where few items or none flipped.
Flips have McNemar's exact test, a binomial test of the discordant pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from jax_selftrain.scoring.metrics import CONFIDENCE, mean_and_stderr, ratio_and_stderr


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval and how many units (items, documents, sequences) it rests on.

    `low` and `high` are None where one unit says nothing about spread.
    """

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Flips:
    """How yes/no outcomes of the same n items moved, with McNemar's exact two-sided p-value."""

    n: int
    kept: int
    """Yes before and after."""
    lost: int
    """Yes before, no after."""
    gained: int
    """No before, yes after."""
    never: int
    """No before and after."""
    mcnemar_p: float
    """Exact two-sided p-value that losses and gains are equally likely (1 when nothing flipped)."""


def mean(values: ArrayLike) -> Estimate:
    """Mean of n values with Student's t interval; ValueError on none."""
    array = _finite(values)
    return _interval(*mean_and_stderr(array), array.size)


def share(outcomes: ArrayLike) -> Estimate:
    """Share of yes among n yes/no outcomes with Wilson's interval; ValueError on none."""
    array = np.asarray(outcomes, bool)
    if array.size == 0:
        raise ValueError("the share of no outcomes at all is undefined")
    result = stats.binomtest(int(array.sum()), array.size)
    interval = result.proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(float(result.statistic), float(interval.low), float(interval.high), array.size)


def ratio(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """Sum of numerators over sum of denominators, the pair (one document) being the unit."""
    above, below = _finite(numerators), _finite(denominators)
    return _interval(*ratio_and_stderr(above, below), above.size)


def mean_change(before: ArrayLike, after: ArrayLike) -> Estimate:
    """Mean of after − before over the same items."""
    return mean(_paired(before, after))


def ratio_change(before: ArrayLike, after: ArrayLike, denominators: ArrayLike) -> Estimate:
    """Change of a rate, for instance nats per token: sum(after − before) / sum(denominators), documents as units."""
    return ratio(_paired(before, after), denominators)


def macro_mean(groups: Sequence[ArrayLike]) -> Estimate:
    """Unweighted mean over groups (tasks) of each group's mean; the groups are fixed, their items are the sample."""
    arrays = [_finite(group) for group in groups]
    if not arrays:
        raise ValueError("the mean over no groups at all is undefined")
    moments = [mean_and_stderr(array) for array in arrays]
    value = float(np.mean([value for value, _ in moments]))
    errors = [error for _, error in moments if error is not None]
    whole = float(np.sqrt(np.sum(np.square(errors)))) / len(arrays) if len(errors) == len(arrays) else None
    # Degrees of freedom of the smallest group: a cautious lower bound for a sum of independent errors.
    return _interval(value, whole, sum(array.size for array in arrays), min(array.size for array in arrays) - 1)


def share_change(before: ArrayLike, after: ArrayLike) -> Estimate:
    """Change of a share, after − before, over the same n yes/no items, with Bonett and Price's interval."""
    moved = flips(before, after)
    centre, error = _adjusted(moved)
    return _around((moved.gained - moved.lost) / moved.n, centre, error, moved.n)


def macro_share_change(
    groups: Sequence[tuple[ArrayLike, ArrayLike]], *, scales: Sequence[float] | None = None
) -> Estimate:
    """Unweighted mean over groups (tasks) of the change of each one's share; the groups are fixed.

    `scales` multiplies each group's change beforehand, for instance 1 / (1 − chance) to normalise by guessing.
    """
    moved = [flips(before, after) for before, after in groups]
    if not moved:
        raise ValueError("the mean over no groups at all is undefined")
    factors = np.ones(len(moved)) if scales is None else np.asarray(scales, np.float64)
    centres, errors = zip(*map(_adjusted, moved), strict=True)
    value = float(np.mean([f * (group.gained - group.lost) / group.n for f, group in zip(factors, moved, strict=True)]))
    error = float(np.sqrt(np.sum(np.square(factors * errors)))) / len(moved)
    return _around(value, float(np.mean(factors * centres)), error, sum(group.n for group in moved))


def flips(before: ArrayLike, after: ArrayLike) -> Flips:
    """Count kept, lost, gained and never over the same yes/no items."""
    old, new = np.asarray(before, bool), np.asarray(after, bool)
    if old.shape != new.shape or old.size == 0:
        raise ValueError(f"before and after are not the same items: {old.shape} and {new.shape}")
    lost, gained = int((old & ~new).sum()), int((~old & new).sum())
    p = float(stats.binomtest(gained, lost + gained).pvalue) if lost + gained else 1.0
    return Flips(old.size, int((old & new).sum()), lost, gained, int((~old & ~new).sum()), p)


def _paired(before: ArrayLike, after: ArrayLike) -> np.ndarray:
    old, new = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if old.shape != new.shape:
        raise ValueError(f"before and after are not the same items: {old.shape} and {new.shape}")
    return new - old


def _finite(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, np.float64).reshape(-1)
    if array.size == 0:
        raise ValueError("the mean of no values at all is undefined")
    if not np.isfinite(array).all():
        raise ValueError("a value is not a finite number")
    return array


def _adjusted(moved: Flips) -> tuple[float, float]:
    """Centre and standard error of a paired difference of shares with one flip of each kind added."""
    gained, lost = (moved.gained + 1) / (moved.n + 2), (moved.lost + 1) / (moved.n + 2)
    variance = (gained + lost - (gained - lost) ** 2) / (moved.n + 2)
    return gained - lost, float(np.sqrt(variance))


def _around(value: float, centre: float, error: float, n: int) -> Estimate:
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * error
    return Estimate(value, centre - half, centre + half, n)


def _interval(value: float, error: float | None, n: int, degrees: int | None = None) -> Estimate:
    if error is None:
        return Estimate(value, None, None, n)
    # Written out because scipy's t.interval answers nan for an error of exactly zero, which is a true answer here:
    # a checkpoint compared with itself.
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1 if degrees is None else degrees)) * error
    return Estimate(value, value - half, value + half, n)
