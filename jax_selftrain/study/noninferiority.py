"""When a capability counts as preserved: a rule over one-sided limits, never over prose.

*Preserved* is a statement of non-inferiority (PROTOCOL of the study; Piaggio et al., JAMA 308, 2012): the loss is
smaller than a margin that was declared beforehand. That two intervals overlap, or that a difference is not
significant, says nothing of the kind: few items make every difference insignificant.

| one-sided 95 % limits of the change | verdict |
|---|---|
| lower limit > −margin | preserved |
| upper limit < −margin | degraded |
| neither | cannot tell |

Each limit is an end of the two-sided 90 % interval; passing it is the one-sided test at 5 %. A change for the better
counts as preserved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from jax_selftrain.study.statistics import Effect

LEVEL = 0.05
"""One-sided error rate of either verdict."""
EXPLORATION, HEADLINE = 3, 5
"""Seeds from which a difference between recipes is explored, and from which it may carry a verdict."""

Verdict = Literal["preserved", "degraded", "cannot tell"]
Standing = Literal["none", "exploration", "headline"]


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


def judge(effect: Effect, margin: float) -> Judgement:
    """Apply the rule to a change. Raises ValueError unless the margin is a positive number."""
    if not margin > 0:
        raise ValueError(f"the margin is {margin}, not a positive number")
    lower, upper = effect.bounds(1 - 2 * LEVEL)
    known = bool(np.isfinite([lower, upper]).all())
    tests = effect.p_above(-margin), effect.p_below(-margin)
    return Judgement(margin, lower if known else None, upper if known else None, *tests, decide(*tests))


def standing(seeds: int) -> Standing:
    """What a difference over so many seeds may be used for."""
    return "none" if seeds < EXPLORATION else "exploration" if seeds < HEADLINE else "headline"


def decide(p_preserved: float, p_degraded: float) -> Verdict:
    """The rule in terms of p-values, which may have been corrected for the number of tests."""
    return "preserved" if p_preserved < LEVEL else "degraded" if p_degraded < LEVEL else "cannot tell"


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: below α together, they err at most once in 1/α families, whatever depends on what."""
    order = np.argsort(p_values, kind="stable")
    stepped = np.sort(p_values) * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return adjusted.tolist()


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's adjusted p-values: the expected share of false ones among those below α is at most α."""
    return stats.false_discovery_control(p_values).tolist() if len(p_values) else []
