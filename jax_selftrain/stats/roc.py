"""Separation of two groups: AUC and TPR at low FPR.

The intervals are percentile intervals of a stratified bootstrap: documents of both groups are resampled independently
(Efron and Tibshirani, An Introduction to the Bootstrap, §8 and §13).
"""

from collections.abc import Callable

import numpy as np
import scipy

from jax_selftrain.io.rng import make_rng
from jax_selftrain.stats.estimators import BOOTSTRAP_ELEMENTS, CONFIDENCE_LEVEL, Estimate

FPR_DENOMINATOR = 100
"""TPR is measured at an FPR of at most 1 / this: 1 %."""


def roc_auc(positives: np.ndarray, negatives: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return P(positive > negative) + P(positive = negative) / 2."""
    n, m = positives.shape[axis], negatives.shape[axis]
    ranks = scipy.stats.rankdata(np.concatenate([positives, negatives], axis=axis), axis=axis)
    total = np.sum(np.take(ranks, np.arange(n), axis=axis), axis=axis)
    return (total - n * (n + 1) / 2) / (n * m)


def tpr_at_low_fpr(positives: np.ndarray, negatives: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the largest TPR with an FPR of at most 1 %.

    With fewer than 100 negatives no false positive is allowed.
    """
    m = negatives.shape[axis]
    allowed = m // FPR_DENOMINATOR
    threshold = np.take(np.sort(negatives, axis=axis), [m - 1 - allowed], axis=axis)
    return np.mean(positives > threshold, axis=axis)


def stratified_bootstrap(
    statistic: Callable[..., np.ndarray], positives: np.ndarray, negatives: np.ndarray, *, resamples: int, seed: int
) -> Estimate:
    """Return a statistic of two groups with its percentile interval.

    Args:
        statistic: `roc_auc` or `tpr_at_low_fpr`.
        positives, negatives: scores [n] and [m], finite. The interval is None if a group has one score.
        resamples: number of bootstrap resamples.
        seed: key of the random stream; equal keys give equal resamples for groups of equal sizes.
    """
    value, size = float(statistic(positives, negatives)), positives.size + negatives.size
    if min(positives.size, negatives.size) < 2:
        return Estimate(value, None, None, size)
    low, high = scipy.stats.bootstrap(
        (positives, negatives),
        statistic,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, BOOTSTRAP_ELEMENTS // size),
        confidence_level=CONFIDENCE_LEVEL,
        method="percentile",
        rng=make_rng("stratified bootstrap", seed),
    ).confidence_interval
    return Estimate(value, float(low), float(high), size)
