"""Standard errors of means and ratios, and intervals of proportions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy
from numpy.typing import ArrayLike

CONFIDENCE_LEVEL = 0.95


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


def exp_and_stderr(value: float, stderr: float | None) -> tuple[float, float | None]:
    """Return exp of an estimate and its standard error (delta method)."""
    result = math.exp(value)
    return result, None if stderr is None else result * stderr


def wilson_interval(outcomes: Sequence[bool] | np.ndarray) -> list[float]:
    """Return Wilson's 95 % interval of a proportion."""
    array = np.asarray(outcomes, bool)
    interval = scipy.stats.binomtest(int(array.sum()), array.size).proportion_ci(CONFIDENCE_LEVEL, method="wilson")
    return [float(interval.low), float(interval.high)]
