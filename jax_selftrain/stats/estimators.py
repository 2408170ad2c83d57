"""What changed between two checkpoints, from the same requests answered by both: effects with 95 % intervals.

All comparisons are *paired*: the same question, document or sequence before and after. Their intervals and p-values
say how the difference would vary over other questions, documents or sequences of the same kind; they speak of **one
pair of checkpoints**. How the difference varies over seeds (other samples, other orders) cannot be seen from one
round, and is often larger: nothing here is a verdict about a recipe.

Intervals of means are Student's t over items. A rate per token (a perplexity's logarithm) is a ratio of two sums over
documents, so its interval treats the *document* as the unit and uses the linearized ratio estimator (Cochran, Sampling
Techniques, §2.11). Shares have Wilson intervals, their paired changes Bonett and Price's (J. Educ. Behav. Stat. 37,
2012: Wald's with one flip added on either side), which does not pretend certainty where few items or none flipped.
Flips have McNemar's exact test, a binomial test of the discordant pairs. Items that share an entity or a
template are not independent: given their clusters, the cluster is the unit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike

from jax_selftrain.stats.standard_errors import CONFIDENCE_Z, mean_and_stderr, ratio_and_stderr

_BOOTSTRAP_ELEMENTS = 2**21
"""Numbers that are resampled together: 16 MiB an array."""
_ROUNDING = 1e-12
"""Relative differences below this are rounding of float64 sums."""


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
class Effect:
    """An estimated change and its error, from which intervals, one-sided limits and p-values follow."""

    value: float
    adjusted_value: float
    """Middle of the interval: `value`, or what a method that is careful with rare flips puts in its place."""
    stderr: float
    """Standard error; infinite where one unit says nothing about spread, zero where nothing can vary."""
    dof: float
    """Degrees of freedom of Student's t; infinite: the normal distribution."""
    n: int

    def bounds(self, confidence: float = CONFIDENCE_Z) -> tuple[float, float]:
        """Ends of the two-sided interval; each is a one-sided limit at (1 + confidence) / 2."""
        # Written out because scipy's t.interval answers nan for an error of exactly zero, which is a true answer here:
        # a checkpoint compared with itself.
        quantile = (1 + confidence) / 2
        normal = math.isinf(self.dof)
        reach = scipy.special.ndtri(quantile) if normal else scipy.special.stdtrit(self.dof, quantile)
        half = float(reach) * self.stderr
        return self.adjusted_value - half, self.adjusted_value + half

    def p_greater(self, threshold: float) -> float:
        """One-sided p-value of the hypothesis that the true change is `threshold` or less."""
        distance = self.adjusted_value - threshold
        if self.stderr == 0:
            return 0.0 if distance > 0 else 1.0
        score = -distance / self.stderr
        normal = math.isinf(self.dof)
        return float(scipy.special.ndtr(score) if normal else scipy.special.stdtr(self.dof, score))

    def p_less(self, threshold: float) -> float:
        """One-sided p-value of the hypothesis that the true change is `threshold` or more."""
        return Effect(-self.value, -self.adjusted_value, self.stderr, self.dof, self.n).p_greater(-threshold)

    def estimate(self) -> Estimate:
        """Value with its 95 % interval."""
        if math.isinf(self.stderr):
            return Estimate(self.value, None, None, self.n)
        return Estimate(self.value, *self.bounds(), self.n)


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
    both_wrong: int
    """No before and after."""
    mcnemar_p: float
    """Exact two-sided p-value that losses and gains are equally likely (1 when nothing flipped)."""
    mcnemar_mid_p: float
    """The same, counting outcomes as extreme as the one seen by half: less cautious, closer to its nominal level."""


def mean(values: ArrayLike) -> Estimate:
    """Mean of n values with Student's t interval; ValueError on none."""
    array = _finite(values)
    return _interval(*mean_and_stderr(array), array.size)


def proportion(outcomes: ArrayLike) -> Estimate:
    """Share of yes among n yes/no outcomes with Wilson's interval; ValueError on none."""
    array = np.asarray(outcomes, bool)
    if array.size == 0:
        raise ValueError("the share of no outcomes at all is undefined")
    result = scipy.stats.binomtest(int(array.sum()), array.size)
    interval = result.proportion_ci(CONFIDENCE_Z, method="wilson")
    return Estimate(float(result.statistic), float(interval.low), float(interval.high), array.size)


def ratio_of_sums(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """Sum of numerators over sum of denominators, the pair (one document) being the unit."""
    above, below = _finite(numerators), _finite(denominators)
    return _interval(*ratio_and_stderr(above, below), above.size)


def mean_change(before: ArrayLike, after: ArrayLike) -> Estimate:
    """Mean of after − before over the same items."""
    return mean(_paired(before, after))


def ratio_change(before: ArrayLike, after: ArrayLike, denominators: ArrayLike) -> Estimate:
    """Change of a rate, for instance nats per token: sum(after − before) / sum(denominators), documents as units."""
    return ratio_of_sums(_paired(before, after), denominators)


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


def paired_proportion_change(before: ArrayLike, after: ArrayLike, clusters: ArrayLike | None = None) -> Estimate:
    """Change of a share, after − before, over the same n yes/no items, with the interval of `share_effect`."""
    return paired_proportion_effect(before, after, clusters).estimate()


def paired_proportion_effect(before: ArrayLike, after: ArrayLike, clusters: ArrayLike | None = None) -> Effect:
    """Change of a share, after − before, over the same n yes/no items, by Bonett and Price.

    Where `clusters` says which items are not independent of each other, the error is that of the ratio estimator with
    the cluster as the unit, though never smaller than Bonett and Price's, and Student's t has clusters − 1 degrees.
    """
    moved = mcnemar_table(before, after)
    center, error = _agresti_min(moved)
    degrees = math.inf
    if clusters is not None:
        sums, sizes = sum_by_cluster(_paired(before, after), clusters), sum_by_cluster(np.ones(moved.n), clusters)
        clustered = ratio_and_stderr(sums, sizes)[1]
        error = math.inf if clustered is None else max(error, clustered)
        degrees = max(sums.size - 1, 1)
    return Effect((moved.gained - moved.lost) / moved.n, center, error, degrees, moved.n)


def macro_effect(effects: Sequence[Effect], scales: ArrayLike | None = None) -> Effect:
    """Unweighted mean over groups (tasks) of each one's change; the groups are fixed, their items are the sample.

    `scales` multiplies each group's change beforehand, for instance 1 / (1 − chance) to normalize by guessing.
    """
    if not effects:
        raise ValueError("the mean over no groups at all is undefined")
    factors = np.ones(len(effects)) if scales is None else np.asarray(scales, np.float64)
    errors = np.array([effect.stderr for effect in effects])
    return Effect(
        float(np.mean([factor * effect.value for factor, effect in zip(factors, effects, strict=True)])),
        float(np.mean(factors * [effect.adjusted_value for effect in effects])),
        float(np.sqrt(np.sum(np.square(factors * errors)))) / len(effects),
        min(effect.dof for effect in effects),
        sum(effect.n for effect in effects),
    )


def mean_effect(values: ArrayLike) -> Effect:
    """Mean of n changes with Student's t; the error of a single one is infinite."""
    array = _finite(values)
    value, error = mean_and_stderr(array)
    return Effect(value, value, math.inf if error is None else error, max(array.size - 1, 1), array.size)


def macro_share_change(
    groups: Sequence[tuple[ArrayLike, ArrayLike]], *, scales: Sequence[float] | None = None
) -> Estimate:
    """The interval of `macro_effect` over groups of (before, after) yes/no items."""
    return macro_effect([paired_proportion_effect(before, after) for before, after in groups], scales).estimate()


def mcnemar_table(before: ArrayLike, after: ArrayLike) -> Flips:
    """Count kept, lost, gained and never over the same yes/no items."""
    old, new = np.asarray(before, bool), np.asarray(after, bool)
    if old.shape != new.shape or old.size == 0:
        raise ValueError(f"before and after are not the same items: {old.shape} and {new.shape}")
    lost, gained = int((old & ~new).sum()), int((~old & new).sum())
    p, mid_p = mcnemar(lost, gained)
    return Flips(old.size, int((old & new).sum()), lost, gained, int((~old & ~new).sum()), p, mid_p)


def mcnemar(lost: int, gained: int) -> tuple[float, float]:
    """Two-sided p and mid-p that losses and gains are equally likely; both 1 when nothing flipped.

    p is exact. Mid-p is P(more extreme) + P(as extreme) / 2 (Fagerland, Lydersen and Laake, BMC Med. Res. Methodol.
    13:91, 2013): it may pass the nominal level by a little for some error rates, p never does and is often far below.
    """
    discordant = lost + gained
    if discordant == 0:
        return 1.0, 1.0
    fewer = min(lost, gained)
    up_to = float(scipy.special.bdtr(fewer, discordant, 0.5))
    below = float(scipy.special.bdtr(fewer - 1, discordant, 0.5)) if fewer else 0.0
    if lost == gained:
        return 1.0, 1.0 - (up_to - below) / 2
    return min(1.0, 2 * up_to), up_to + below  # where they differ by one, half the tail is .5 but for rounding


def sign_flip_test(differences: ArrayLike) -> tuple[float, float]:
    """Two-sided p and mid-p of the sum of whole numbers whose signs are arbitrary: McNemar's test for clusters.

    Each entry is a cluster's gains − losses. If before and after are exchangeable, each could as well have come with
    the other sign; the distribution of the sum over all signs is worked out exactly. Where every cluster is one item
    this is McNemar's exact test.
    """
    steps = np.abs(np.asarray(differences, np.int64))
    steps = steps[steps > 0]
    reach = int(steps.sum())
    if reach == 0:
        return 1.0, 1.0
    chances = np.zeros(2 * reach + 1)  # of the sums −reach … reach
    chances[reach] = 1.0
    for step in steps:
        chances = (np.roll(chances, step) + np.roll(chances, -step)) / 2  # nothing is rolled over the ends
    distance = np.abs(np.arange(-reach, reach + 1))
    seen = abs(int(np.sum(differences)))
    beyond, equal = float(chances[distance > seen].sum()), float(chances[distance == seen].sum())
    return min(1.0, beyond + equal), min(1.0, beyond + equal / 2)


def bootstrap(
    numerators: ArrayLike,
    denominators: ArrayLike | None = None,
    clusters: ArrayLike | None = None,
    *,
    resamples: int = 9999,
    seed: int = 0,
) -> Estimate:
    """Mean, or Σ numerators / Σ denominators, with the BCa bootstrap interval over documents, or over whole clusters.

    A change of two models on the same documents is bootstrapped in pairs by giving its differences as numerators.
    BCa (Efron, J. Am. Stat. Assoc. 82, 1987) corrects bias and skew; where it has no answer (all resamples on one side
    of the estimate) the percentile interval stands in. n is the number of units that were resampled.
    """
    above = _finite(numerators)
    below = np.ones_like(above) if denominators is None else _finite(denominators)
    if clusters is not None:
        above, below = sum_by_cluster(above, clusters), sum_by_cluster(below, clusters)
    value, n = float(above.sum() / below.sum()), above.size
    if n < 2:
        return Estimate(value, None, None, n)
    if np.abs(above - value * below).max() <= _ROUNDING * np.abs(above).max():
        return Estimate(value, value, value, n)  # every document says the same: resamples could not differ
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)  # answered below
        found = scipy.stats.bootstrap(
            (above, below),
            lambda y, x, axis: y.sum(axis) / x.sum(axis),
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=max(1, _BOOTSTRAP_ELEMENTS // n),
            confidence_level=CONFIDENCE_Z,
            rng=np.random.default_rng(seed),
        )
    low, high = found.confidence_interval
    if not np.isfinite([low, high]).all():
        low, high = np.quantile(found.bootstrap_distribution, [(1 - CONFIDENCE_Z) / 2, (1 + CONFIDENCE_Z) / 2])
    return Estimate(value, float(low), float(high), n)


def sum_by_cluster(values: ArrayLike, clusters: ArrayLike) -> np.ndarray:
    """Sum of the values of each cluster, clusters in the order of their labels."""
    array, labels = np.asarray(values, np.float64), np.asarray(clusters)
    if array.shape != labels.shape:
        raise ValueError(f"{array.size} values, but {labels.size} labels of clusters")
    return np.bincount(np.unique(labels, return_inverse=True)[1], array)


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


def _agresti_min(moved: Flips) -> tuple[float, float]:
    """Center and standard error of a paired difference of shares with one flip of each kind added."""
    gained, lost = (moved.gained + 1) / (moved.n + 2), (moved.lost + 1) / (moved.n + 2)
    variance = (gained + lost - (gained - lost) ** 2) / (moved.n + 2)
    return gained - lost, float(np.sqrt(variance))


def _interval(value: float, error: float | None, n: int, degrees: int | None = None) -> Estimate:
    if error is None:
        return Estimate(value, None, None, n)
    return Effect(value, value, error, n - 1 if degrees is None else degrees, n).estimate()
