"""Power of a one-sided Student's t-test over seeds."""

from __future__ import annotations

import math

import scipy

from jax_selftrain.stats.noninferiority import ALPHA

TARGET_POWER = 0.8


def power(effect: float, stddev: float, seeds: int, alpha: float = ALPHA) -> float:
    """Return the probability that the test finds a true mean of `effect`.

    Args:
        effect: the true mean difference.
        stddev: standard deviation of the difference over seeds, in the unit of `effect`.
        seeds: number of differences.
        alpha: one-sided level of the test.

    Raises:
        ValueError: fewer than two seeds, or a standard deviation that is not positive.
    """
    if seeds < 2 or stddev <= 0:
        raise ValueError(f"{seeds} seeds with a standard deviation of {stddev} have no power")
    critical = scipy.stats.t.isf(alpha, seeds - 1)
    return float(scipy.stats.nct.sf(critical, seeds - 1, effect / stddev * math.sqrt(seeds)))


def minimum_detectable_effect(stddev: float, seeds: int, alpha: float = ALPHA, target: float = TARGET_POWER) -> float:
    """Return the true mean that the test finds with probability `target`."""
    ratio = scipy.optimize.brentq(lambda ratio: power(ratio, 1.0, seeds, alpha) - target, 0.0, 1e3)
    return float(ratio) * stddev
