"""When a capability counts as preserved: a rule over one-sided limits, never over prose.

*Preserved* is a statement of non-inferiority (Piaggio et al., JAMA 308, 2012): the loss is smaller than a
margin that was declared beforehand. That two intervals overlap, or that a difference is not significant, says nothing
of the kind: few items make every difference insignificant.

| one-sided 95 % limits of the change | verdict |
|---|---|
| lower limit > −margin | preserved |
| upper limit < −margin | degraded |
| neither | cannot tell |

Each limit is an end of the two-sided 90 % interval; passing it is the one-sided test at 5 %. A change for the better
counts as preserved.

For a share the limit is the more cautious of two: Bonett and Price's, which errs up to 8 % of the time where there are
hardly more flips than the margin needs, and the score limit of Tango (Stat. Med. 17, 1998), which does so at the other
end. Together they kept to 5 % wherever it was worked out (docs/comparison.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import scipy

from jax_selftrain.stats.estimators import Effect

ALPHA = 0.05
"""One-sided error rate of either verdict."""
EXPLORATION, HEADLINE = 3, 5
"""Seeds from which a difference between recipes is explored, and from which it may carry a verdict."""

Verdict = Literal["preserved", "degraded", "cannot tell"]
EvidenceLevel = Literal["none", "exploration", "headline"]


@dataclass(frozen=True)
class Judgement:
    """What the rule says about one change; limits and margin in the units of the change."""

    margin: float
    lower: float | None
    """One-sided 95 % lower limit; None where one unit says nothing about spread."""
    upper: float | None
    p_preserved: float
    """One-sided p-value of the hypothesis that the loss is the margin or more."""
    p_degraded: float
    """One-sided p-value of the hypothesis that the loss is the margin or less."""
    verdict: Verdict


def noninferiority_test(effect: Effect, margin: float) -> Judgement:
    """Apply the rule to a change. Raises ValueError unless the margin is a positive number."""
    if not margin > 0:
        raise ValueError(f"the margin is {margin}, not a positive number")
    lower, upper = effect.bounds(1 - 2 * ALPHA)
    known = bool(np.isfinite([lower, upper]).all())
    tests = effect.p_greater(-margin), effect.p_less(-margin)
    return Judgement(margin, lower if known else None, upper if known else None, *tests, decide(*tests))


def paired_noninferiority_test(effect: Effect, lost: int, gained: int, margin: float) -> Judgement:
    """Apply the rule to the change of a share, given by its effect and its flips among `effect.n` items.

    An effect that cannot vary (a model against itself) is judged as it is.
    """
    judgment = noninferiority_test(effect, margin)
    if effect.stderr == 0:
        return judgment
    low, high = score_confidence_limit(lost, gained, effect.n), -score_confidence_limit(gained, lost, effect.n)
    p_preserved = max(judgment.p_preserved, score_test_p(lost, gained, effect.n, -margin))
    p_degraded = max(judgment.p_degraded, score_test_p(gained, lost, effect.n, margin))
    return replace(
        judgment,
        lower=None if judgment.lower is None else min(judgment.lower, low),
        upper=None if judgment.upper is None else max(judgment.upper, high),
        p_preserved=p_preserved,
        p_degraded=p_degraded,
        verdict=decide(p_preserved, p_degraded),
    )


def score_test_p(lost: int, gained: int, n: int, threshold: float) -> float:
    """One-sided p-value of the hypothesis that a share of n items changed by `threshold` or less: Tango's score test.

    The variance is that of the likeliest flip rates that differ by exactly the threshold.
    """
    # Tango's equations 10 and 11, for losses − gains = D.
    change = -threshold
    b = -lost - gained + (2 * n - lost + gained) * change
    gain_rate = (math.sqrt(max(b * b + 8 * n * gained * change * (1 - change), 0.0)) - b) / (4 * n)
    variance = n * max(2 * gain_rate + change * (1 - change), 0.0)
    distance = lost - gained - n * change
    if variance == 0:
        return 0.5 if distance == 0 else float(distance > 0)
    return float(scipy.special.ndtr(distance / math.sqrt(variance)))


def score_confidence_limit(lost: int, gained: int, n: int, level: float = ALPHA) -> float:
    """One-sided lower limit, at 1 − `level`, of the change of a share, (gained − lost) / n, by Tango's score test."""
    value = (gained - lost) / n
    ends = -1 + 1e-9, value
    if value <= ends[0] or score_test_p(lost, gained, n, ends[0]) >= level:
        return -1.0
    return float(scipy.optimize.brentq(lambda threshold: score_test_p(lost, gained, n, threshold) - level, *ends))


def evidence_level(seeds: int) -> EvidenceLevel:
    """What a difference over so many seeds may be used for."""
    return "none" if seeds < EXPLORATION else "exploration" if seeds < HEADLINE else "headline"


def decide(p_preserved: float, p_degraded: float) -> Verdict:
    """The rule in terms of p-values, which may have been corrected for the number of tests."""
    return "preserved" if p_preserved < ALPHA else "degraded" if p_degraded < ALPHA else "cannot tell"


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: below α together, they err at most once in 1/α families, whatever depends on what."""
    order = np.argsort(p_values, kind="stable")
    stepped = np.sort(p_values) * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return adjusted.tolist()


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's adjusted p-values: the expected share of false ones among those below α is at most α."""
    return scipy.stats.false_discovery_control(p_values).tolist() if len(p_values) else []
