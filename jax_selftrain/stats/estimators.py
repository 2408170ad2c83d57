"""Estimates, paired changes and paired tests, with 95 % intervals.

All comparisons are *paired*: the same question, document or sequence before and after. Their intervals and p-values
describe other items of the same kind and **one pair of checkpoints**. The variation over seeds (other samples, other
orders) is often larger, and one pair of checkpoints does not show it.

Means have Student's t intervals over items. Rates per token use the linearized ratio estimator over documents (Cochran,
Sampling Techniques, §2.11). Proportions have Wilson intervals. Paired changes of proportions follow Bonett and Price
(J. Educ. Behav. Stat. 37, 2012). Items of one entity or template form a cluster, and the cluster is then the unit.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy
from numpy.typing import ArrayLike

from jax_selftrain.io.rng import make_rng

CONFIDENCE_LEVEL = 0.95
_LOG_MAX = math.log(np.finfo(np.float64).max)
BOOTSTRAP_ELEMENTS = 2**21
"""Numbers that are resampled in one batch: 16 MiB an array."""
_ROUNDING = 1e-12
"""Relative differences below this are rounding of float64 sums."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval and its number of units.

    Units are items, documents, sequences or seeds. `low` and `high` are None for a single unit.
    """

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Effect:
    """An estimated change and its standard error."""

    value: float
    adjusted_value: float
    """Center of the interval: `value`, or the adjusted estimate of a method for rare flips."""
    stderr: float
    """Standard error; infinite for a single unit, zero where nothing can vary."""
    dof: float
    """Degrees of freedom of Student's t; infinite for the normal distribution."""
    n: int
    limits: tuple[float, float] = (-math.inf, math.inf)
    """Smallest and largest possible value; intervals end there."""

    def bounds(self, confidence: float = CONFIDENCE_LEVEL) -> tuple[float, float]:
        """Return the ends of the two-sided interval."""
        # scipy's t.interval returns nan for an error of exactly zero (a checkpoint compared with itself).
        quantile = (1 + confidence) / 2
        z = scipy.special.ndtri(quantile) if math.isinf(self.dof) else scipy.special.stdtrit(self.dof, quantile)
        half = float(z) * self.stderr
        return max(self.adjusted_value - half, self.limits[0]), min(self.adjusted_value + half, self.limits[1])

    def p_greater(self, threshold: float) -> float:
        """Return the one-sided p-value of a true change ≤ `threshold`."""
        distance = self.adjusted_value - threshold
        if self.stderr == 0:
            return 0.0 if distance > 0 else 1.0
        score = -distance / self.stderr
        return float(scipy.special.ndtr(score) if math.isinf(self.dof) else scipy.special.stdtr(self.dof, score))

    def p_less(self, threshold: float) -> float:
        """Return the one-sided p-value of a true change ≥ `threshold`."""
        return Effect(-self.value, -self.adjusted_value, self.stderr, self.dof, self.n).p_greater(-threshold)

    def estimate(self) -> Estimate:
        """Return the value with its 95 % interval."""
        if math.isinf(self.stderr):
            return Estimate(self.value, None, None, self.n)
        return Estimate(self.value, *self.bounds(), self.n)


@dataclass(frozen=True)
class Flips:
    """Paired yes/no outcomes of n items, with McNemar's two-sided p-values."""

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
    """Exact p-value of equally likely losses and gains; 1 when nothing flipped."""
    mcnemar_mid_p: float
    """Mid-p value, which counts equally extreme outcomes by half: less conservative."""


def mean_and_stderr(values: ArrayLike) -> tuple[float, float | None]:
    """Return the mean of n numbers and its standard error.

    The error is s/√n with the sample standard deviation s (n − 1), as in lm-evaluation-harness. For proportions this
    is √(p(1 − p)/(n − 1)). The error of a single number is None.
    """
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    if array.size < 2:
        return mean, None
    return mean, float(array.std(ddof=1) / math.sqrt(array.size))


def ratio_and_stderr(numerators: ArrayLike, denominators: ArrayLike) -> tuple[float, float | None]:
    """Return Σy / Σx and its standard error by linearization.

    The document is the unit because tokens of one text are not independent (Cochran, Sampling Techniques, §2.11).
    """
    y, x = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    ratio = float(y.sum() / x.sum())
    if y.size < 2:
        return ratio, None
    residuals = y - ratio * x
    return ratio, float(math.sqrt(y.size / (y.size - 1) * np.sum(residuals**2)) / x.sum())


def finite_exp(value: float | None) -> float | None:
    """Return exp of a number; None for None, and if it overflows.

    The perplexity of a word may be beyond float64 where words are not separated by white space.
    """
    return None if value is None or value > _LOG_MAX else math.exp(value)


def exp_and_stderr(value: float, stderr: float | None) -> tuple[float | None, float | None]:
    """Return exp of an estimate and its standard error (delta method).

    Each is None if it overflows.
    """
    result = finite_exp(value)
    error = None if result is None or stderr is None else result * stderr
    return result, None if error is None or math.isinf(error) else error


def wilson_interval(outcomes: ArrayLike) -> list[float]:
    """Return Wilson's 95 % interval of a proportion."""
    array = np.asarray(outcomes, bool)
    interval = scipy.stats.binomtest(int(array.sum()), array.size).proportion_ci(CONFIDENCE_LEVEL, method="wilson")
    return [float(interval.low), float(interval.high)]


def mean(values: ArrayLike) -> Estimate:
    """Return the mean of [n] values with Student's t interval."""
    return mean_effect(values).estimate()


def proportion(outcomes: ArrayLike) -> Estimate:
    """Return the proportion of yes among [n] outcomes with Wilson's interval."""
    array = np.asarray(outcomes, bool)
    if array.size == 0:
        raise ValueError("the proportion of no outcomes is undefined")
    low, high = wilson_interval(array)
    return Estimate(float(array.mean()), low, high, array.size)


def ratio_of_sums(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """Return Σ numerators / Σ denominators; the unit is one document."""
    above, below = _as_finite(numerators), _as_finite(denominators)
    return _make_effect(*ratio_and_stderr(above, below), above.size).estimate()


def macro_mean(groups: Sequence[ArrayLike], limits: Sequence[tuple[float, float]] = ()) -> Estimate:
    """Return the unweighted mean over groups; see `macro_effect`.

    `limits` are the smallest and largest possible value of each group; default: none.
    """
    effects = [mean_effect(group) for group in groups]
    if limits:
        effects = [replace(effect, limits=ends) for effect, ends in zip(effects, limits, strict=True)]
    return macro_effect(effects).estimate()


def paired_proportion_effect(before: ArrayLike, after: ArrayLike, clusters: ArrayLike | None = None) -> Effect:
    """Return Bonett and Price's paired change of a proportion.

    Args:
        before, after: bool [n].
        clusters: labels [n] of items that are not independent. The error is then that of the ratio estimator over
            clusters, or Bonett and Price's if that is larger, with clusters − 1 degrees of freedom.
    """
    moved = mcnemar_table(before, after)
    # One flip of each kind is added (Agresti and Min).
    gained, lost = (moved.gained + 1) / (moved.n + 2), (moved.lost + 1) / (moved.n + 2)
    error = float(np.sqrt((gained + lost - (gained - lost) ** 2) / (moved.n + 2)))
    degrees = math.inf
    if clusters is not None:
        sums = sum_by_cluster(np.asarray(after, np.float64) - np.asarray(before, np.float64), clusters)
        clustered = ratio_and_stderr(sums, sum_by_cluster(np.ones(moved.n), clusters))[1]
        error = math.inf if clustered is None else max(error, clustered)
        degrees = max(sums.size - 1, 1)
    return Effect((moved.gained - moved.lost) / moved.n, gained - lost, error, degrees, moved.n, (-1.0, 1.0))


def macro_effect(effects: Sequence[Effect], scales: ArrayLike | None = None) -> Effect:
    """Return the unweighted mean over groups (tasks) of each group's change.

    Args:
        effects: one change for each group. The groups are fixed and their items are the sample. The smallest group's
            degrees of freedom are a lower bound for the sum of independent errors.
        scales: a factor for each group's change, for instance 1 / (1 − chance) to normalize by chance.
    """
    if not effects:
        raise ValueError("the mean over no groups is undefined")
    factors = np.ones(len(effects)) if scales is None else np.asarray(scales, np.float64)
    errors = np.array([effect.stderr for effect in effects])
    lower, upper = factors @ np.array([effect.limits for effect in effects]) / len(effects)
    return Effect(
        float(np.mean([factor * effect.value for factor, effect in zip(factors, effects, strict=True)])),
        float(np.mean(factors * [effect.adjusted_value for effect in effects])),
        float(np.sqrt(np.sum(np.square(factors * errors)))) / len(effects),
        min(effect.dof for effect in effects),
        sum(effect.n for effect in effects),
        (float(lower), float(upper)),
    )


def mean_effect(values: ArrayLike, step: float = 0.0) -> Effect:
    """Return the mean of [n] changes; a single change has infinite error.

    `step` is the resolution of the values, for instance one question of an accuracy: values may agree by rounding to
    it. The standard deviation is at least that of rounding, step / √12.
    """
    array = _as_finite(values)
    found = _make_effect(*mean_and_stderr(array), array.size)
    return replace(found, stderr=max(found.stderr, step / math.sqrt(12 * array.size)))


def crossed_effect(tasks: Sequence[np.ndarray], step: float = 0.0) -> Effect:
    """Return the mean change where seeds and items both are samples.

    Over seeds alone, the items are fixed: an item that changes in every seed counts as certain. The variance of the
    mean over crossed seeds and items is σ²(seeds)/S + σ²(items)/n + σ²(seeds × items)/(S n), estimated by the mean
    squares of a two-way analysis of variance in each task, with Satterthwaite's degrees of freedom.

    Args:
        tasks: changes [S, n] of each task, times its weight in the mean; tasks are fixed and share the seeds.
        step: as in `mean_effect`.

    Returns the wider of this effect and the one over seeds alone. `n` counts seeds.
    """
    over_seeds = mean_effect(np.sum([table.mean(axis=1) for table in tasks], axis=0), step)
    seeds = over_seeds.n
    if seeds < 2 or any(table.shape[1] < 2 for table in tasks):
        return over_seeds
    terms = [(over_seeds.stderr**2, seeds - 1.0)]
    for table in tasks:
        items = table.mean(axis=0)
        residuals = table - items - table.mean(axis=1, keepdims=True) + table.mean()
        degrees = (seeds - 1) * (items.size - 1)
        terms.append((float(items.var(ddof=1)) / items.size, items.size - 1.0))
        terms.append((-float(np.sum(residuals**2)) / degrees / (seeds * items.size), degrees))
    variance = sum(term for term, _ in terms)
    if variance <= over_seeds.stderr**2:
        return over_seeds
    degrees = variance**2 / sum(term**2 / dof for term, dof in terms if term)
    crossed = replace(over_seeds, stderr=math.sqrt(variance), dof=degrees)
    return max(over_seeds, crossed, key=lambda effect: effect.bounds()[1])


def mcnemar_table(before: ArrayLike, after: ArrayLike) -> Flips:
    """Count how yes/no outcomes of the same items changed."""
    old, new = np.asarray(before, bool), np.asarray(after, bool)
    if old.shape != new.shape or old.size == 0:
        raise ValueError(f"before and after are not the same items: {old.shape} and {new.shape}")
    lost, gained = int((old & ~new).sum()), int((~old & new).sum())
    p, mid_p = mcnemar(lost, gained)
    return Flips(old.size, int((old & new).sum()), lost, gained, int((~old & ~new).sum()), p, mid_p)


def mcnemar(lost: int, gained: int) -> tuple[float, float]:
    """Return McNemar's exact two-sided p-value and mid-p value.

    Both are 1 when nothing flipped. Mid-p is P(more extreme) + P(equally extreme) / 2 (Fagerland, Lydersen and Laake,
    BMC Med. Res. Methodol. 13:91, 2013). It can exceed the nominal level slightly. The exact p never does and is often
    conservative.
    """
    discordant = lost + gained
    if discordant == 0:
        return 1.0, 1.0
    fewer = min(lost, gained)
    up_to = float(scipy.special.bdtr(fewer, discordant, 0.5))
    below = float(scipy.special.bdtr(fewer - 1, discordant, 0.5)) if fewer else 0.0
    if lost == gained:
        return 1.0, 1.0 - (up_to - below) / 2
    return min(1.0, 2 * up_to), up_to + below  # rounding can exceed 1 where the counts differ by one


def sign_flip_test(differences: ArrayLike) -> tuple[float, float]:
    """Return exact two-sided p and mid-p of McNemar's test for clusters.

    Args:
        differences: int [clusters], gains − losses of each cluster. If before and after are exchangeable, both signs of
            each entry are equally likely. With one item per cluster this is McNemar's exact test.
    """
    steps = np.abs(np.asarray(differences, np.int64))
    steps = steps[steps > 0]
    total = int(steps.sum())
    if total == 0:
        return 1.0, 1.0
    probabilities = np.zeros(2 * total + 1)  # of the sums −total … total
    probabilities[total] = 1.0
    for step in steps:
        probabilities = (np.roll(probabilities, step) + np.roll(probabilities, -step)) / 2  # the ends are zero
    distance = np.abs(np.arange(-total, total + 1))
    observed = abs(int(np.sum(differences)))
    beyond = float(probabilities[distance > observed].sum())
    equal = float(probabilities[distance == observed].sum())
    return min(1.0, beyond + equal), min(1.0, beyond + equal / 2)


def bootstrap(
    numerators: ArrayLike,
    denominators: ArrayLike | None = None,
    clusters: ArrayLike | None = None,
    *,
    resamples: int = 9999,
    seed: int = 0,
) -> Estimate:
    """Return a mean or ratio of sums with its BCa bootstrap interval.

    BCa is the method of Efron (J. Am. Stat. Assoc. 82, 1987). The interval is the percentile interval where BCa is
    undefined (all resamples on one side of the estimate).

    Args:
        numerators: [n]; differences of two models on the same documents give a paired bootstrap.
        denominators: [n]; unset for the mean.
        clusters: labels [n]; whole clusters are resampled instead of documents.
        resamples: number of bootstrap resamples.
        seed: key of the random stream.
    """
    above = _as_finite(numerators)
    below = np.ones_like(above) if denominators is None else _as_finite(denominators)
    if clusters is not None:
        above, below = sum_by_cluster(above, clusters), sum_by_cluster(below, clusters)
    value, n = float(above.sum() / below.sum()), above.size
    if n < 2:
        return Estimate(value, None, None, n)
    if np.abs(above - value * below).max() <= _ROUNDING * np.abs(above).max():
        return Estimate(value, value, value, n)  # all resamples agree
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)  # handled below
        result = scipy.stats.bootstrap(
            (above, below),
            lambda y, x, axis: y.sum(axis) / x.sum(axis),
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=max(1, BOOTSTRAP_ELEMENTS // n),
            confidence_level=CONFIDENCE_LEVEL,
            rng=make_rng("bootstrap", seed),
        )
    low, high = result.confidence_interval
    if not np.isfinite([low, high]).all():
        low, high = np.quantile(result.bootstrap_distribution, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    return Estimate(value, float(low), float(high), n)


def sum_by_cluster(values: ArrayLike, clusters: ArrayLike) -> np.ndarray:
    """Return the sum of each cluster, in the order of the labels."""
    array, labels = np.asarray(values, np.float64), np.asarray(clusters)
    if array.shape != labels.shape:
        raise ValueError(f"{array.size} values, but {labels.size} cluster labels")
    return np.bincount(np.unique(labels, return_inverse=True)[1], array)


def _as_finite(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, np.float64).reshape(-1)
    if array.size == 0:
        raise ValueError("the mean of no values is undefined")
    if not np.isfinite(array).all():
        raise ValueError("a value is not a finite number")
    return array


def _make_effect(value: float, error: float | None, n: int) -> Effect:
    return Effect(value, value, math.inf if error is None else error, max(n - 1, 1), n)
