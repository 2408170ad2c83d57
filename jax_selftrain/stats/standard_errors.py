"""Means and ratios with their standard errors; the unit is the document (question, text, sequence)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE_Z = 0.95


def mean_and_stderr(values: ArrayLike) -> tuple[float, float | None]:
    """Mean of n numbers and its standard error s/√n with the sample's s (n − 1), as lm-evaluation-harness has it.

    For shares this is √(p(1 − p)/(n − 1)). One number says nothing about its spread: None.
    """
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    if array.size < 2:
        return mean, None
    return mean, float(array.std(ddof=1) / math.sqrt(array.size))


def ratio_and_stderr(numerators: ArrayLike, denominators: ArrayLike) -> tuple[float, float | None]:
    """Σy / Σx over documents, with the standard error of the linearized ratio estimator.

    Tokens of one text are not independent, so the document is the unit (Cochran, Sampling Techniques, §2.11).
    """
    y, x = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    ratio = float(y.sum() / x.sum())
    if y.size < 2:
        return ratio, None
    residuals = y - ratio * x
    return ratio, float(math.sqrt(y.size / (y.size - 1) * np.sum(residuals**2)) / x.sum())


def exp_and_stderr(value: float, stderr: float | None) -> tuple[float, float | None]:
    """exp of an estimate, its standard error carried over to first order (delta method)."""
    result = math.exp(value)
    return result, None if stderr is None else result * stderr


def wilson_interval(outcomes: Sequence[bool] | np.ndarray) -> list[float]:
    """Wilson's 95 % interval of a share: unlike p ± 2 SE it is sensible where nothing or everything succeeded."""
    from scipy import stats

    array = np.asarray(outcomes, bool)
    interval = stats.binomtest(int(array.sum()), array.size).proportion_ci(CONFIDENCE_Z, method="wilson")
    return [float(interval.low), float(interval.high)]
