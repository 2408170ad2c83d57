"""Verdicts and their power: non-inferiority tests (Piaggio et al., JAMA 308, 2012).

| one-sided 95 % limits of the change | verdict |
|---|---|
| lower limit > −margin | preserved |
| upper limit < −margin | degraded |
| neither | cannot tell |

The margin is declared beforehand. Each limit is an end of the two-sided 90 % interval. For proportions the limit is
the more conservative of Bonett and Price's (8 % errors where flips are rare) and Tango's (Stat. Med. 17, 1998).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy

from jax_selftrain.stats.estimators import Effect

ALPHA = 0.05
"""One-sided error rate of either verdict."""
TARGET_POWER = 0.8
EXPLORATION, HEADLINE = 3, 5
"""Minimum number of seeds for exploring a difference between recipes, and for a verdict on it."""

Verdict = Literal["preserved", "degraded", "cannot tell"]
EvidenceLevel = Literal["none", "exploration", "headline"]


@dataclass(frozen=True)
class NoninferiorityResult:
    """Result of the rule, in the unit of the change."""

    margin: float
    lower: float | None
    """One-sided 95 % lower limit; None for a single unit."""
    upper: float | None
    p_preserved: float
    """One-sided p-value of the hypothesis that the loss is at least the margin."""
    p_degraded: float
    """One-sided p-value of the hypothesis that the loss is at most the margin."""
    verdict: Verdict


def noninferiority_test(effect: Effect, margin: float, flips: tuple[int, int] | None = None) -> NoninferiorityResult:
    """Apply the rule.

    Args:
        effect: the change.
        margin: largest loss that counts as preserved.
        flips: numbers of lost and gained items among `effect.n`, for a change of a proportion. A zero standard error (a
            model compared with itself) skips Tango's test.

    Raises:
        ValueError: the margin is not positive.
    """
    if not margin > 0:
        raise ValueError(f"the margin is {margin}, not a positive number")
    lower, upper = effect.bounds(1 - 2 * ALPHA)
    known = bool(np.isfinite([lower, upper]).all())
    p_preserved, p_degraded = effect.p_greater(-margin), effect.p_less(-margin)
    if flips is not None and effect.stderr != 0:
        lost, gained = flips
        lower = min(lower, score_confidence_limit(lost, gained, effect.n))
        upper = max(upper, -score_confidence_limit(gained, lost, effect.n))
        p_preserved = max(p_preserved, score_test_p(lost, gained, effect.n, -margin))
        p_degraded = max(p_degraded, score_test_p(gained, lost, effect.n, margin))
    ends: tuple[float | None, float | None] = (lower, upper) if known else (None, None)
    return NoninferiorityResult(margin, *ends, p_preserved, p_degraded, decide(p_preserved, p_degraded))


def score_test_p(lost: int, gained: int, n: int, threshold: float) -> float:
    """Return the one-sided p-value of Tango's score test.

    The hypothesis is a change of at most `threshold` of a proportion of n items. The variance is that of the
    maximum-likelihood flip rates under the constraint (Tango's equations 10 and 11).
    """
    change = -threshold
    b = -lost - gained + (2 * n - lost + gained) * change
    gain_rate = (math.sqrt(max(b * b + 8 * n * gained * change * (1 - change), 0.0)) - b) / (4 * n)
    variance = n * max(2 * gain_rate + change * (1 - change), 0.0)
    distance = lost - gained - n * change
    if variance == 0:
        return 0.5 if distance == 0 else float(distance > 0)
    return float(scipy.special.ndtr(distance / math.sqrt(variance)))


def score_confidence_limit(lost: int, gained: int, n: int, level: float = ALPHA) -> float:
    """Return Tango's one-sided lower confidence limit of (gained − lost) / n."""
    value = (gained - lost) / n
    ends = -1 + 1e-9, value
    if value <= ends[0] or score_test_p(lost, gained, n, ends[0]) >= level:
        return -1.0
    return float(scipy.optimize.brentq(lambda threshold: score_test_p(lost, gained, n, threshold) - level, *ends))


def evidence_level(seeds: int) -> EvidenceLevel:
    """Return the use that a number of seeds permits."""
    return "none" if seeds < EXPLORATION else "exploration" if seeds < HEADLINE else "headline"


def decide(p_preserved: float, p_degraded: float) -> Verdict:
    """Return the verdict for p-values, which may be corrected for multiple tests."""
    return "preserved" if p_preserved < ALPHA else "degraded" if p_degraded < ALPHA else "cannot tell"


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, which control the family-wise error rate."""
    order = np.argsort(p_values, kind="stable")
    stepped = np.sort(p_values) * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return adjusted.tolist()


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Return Benjamini and Hochberg's adjusted p-values, which control the false discovery rate."""
    return scipy.stats.false_discovery_control(p_values).tolist() if len(p_values) else []


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
