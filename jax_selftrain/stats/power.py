"""What a study can find, said before it is begun: the power of its claims' tests.

A claim is tested by a one-sided t over seeds. Its power depends on how much the difference varies from seed to seed,
which only a pilot can say; until there is one, two spreads that were seen in practice are assumed. Between the primary
claims Holm's method shares the level out: at worst a claim is tested at a part of it, at best at the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy

from jax_selftrain.config import ClaimConfig, StudyConfig
from jax_selftrain.stats.noninferiority import ALPHA, HEADLINE
from jax_selftrain.study.measure_names import display_scale
from jax_selftrain.study.preregistration import claim_differences

TARGET_POWER = 0.8
ASSUMED_SPREAD = (0.005, 0.01)
"""Spreads over seeds (standard deviations) of an accuracy: half a point and one point."""


def power(effect: float, spread: float, seeds: int, level: float = ALPHA) -> float:
    """Chance that a one-sided t over `seeds` differences finds a true mean of `effect`; `spread` is their deviation.

    Raises ValueError for fewer than two seeds, or a spread that is not positive.
    """
    if seeds < 2 or spread <= 0:
        raise ValueError(f"{seeds} seeds with a spread of {spread} have no power")
    critical = scipy.stats.t.isf(level, seeds - 1)
    return float(scipy.stats.nct.sf(critical, seeds - 1, effect / spread * math.sqrt(seeds)))


def detectable(spread: float, seeds: int, level: float = ALPHA, target: float = TARGET_POWER) -> float:
    """The true mean that is found with the wanted chance, in the unit of the spread."""
    found = scipy.optimize.brentq(lambda ratio: power(ratio, 1.0, seeds, level) - target, 0.0, 1e3)
    return float(found) * spread


def power_lines(config: StudyConfig, earlier: Mapping[str, Any] | None = None) -> list[str]:
    """For `--dry-run`: what each claim can find. `earlier` is a `results.json`, of a pilot or of fewer seeds."""
    seeds, primary = len(config.seeds), sum(claim.primary for claim in config.claims)
    if not config.claims:
        return ["no claims are declared: there will be no verdicts"]
    if seeds < HEADLINE:
        return [f"no claim gets a verdict with {seeds} seed{'s' * (seeds > 1)}: that takes {HEADLINE}"]
    lines = [
        f"power of one-sided tests over {seeds} seeds at {ALPHA:g}, by Holm's method for {primary} primary claims:"
    ]
    for claim in config.claims:
        alpha = ALPHA / max(primary, 1) if claim.primary else ALPHA
        lines += [f"  {claim.name}: {told}" for told in _format(claim, seeds, alpha, _spread(claim, earlier))]
    return lines


def _spread(claim: ClaimConfig, earlier: Mapping[str, Any] | None) -> float | None:
    """Standard deviation over the seeds of an earlier run; None where it has fewer than two."""
    values = claim_differences(claim, earlier["cells"], earlier["interaction"]) if earlier else []
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _format(claim: ClaimConfig, seeds: int, level: float, measured: float | None) -> list[str]:
    if measured is None and display_scale(claim.measure) != 100:
        return ["its spread over seeds is not known before a pilot"]
    if measured == 0:
        return ["the seeds of the earlier run agree exactly; nothing can be said"]
    spreads: Sequence[float] = ASSUMED_SPREAD if measured is None else (measured,)
    source = "assumed" if measured is None else "measured"
    return [
        f"with a spread of {_format_amount(spread, claim)} ({source}), {_detectable_effect(claim, spread, seeds, level)}"
        for spread in spreads
    ]


def _detectable_effect(claim: ClaimConfig, spread: float, seeds: int, level: float) -> str:
    if claim.margin is not None:
        chance = _range(claim.margin, spread, seeds, level)
        return f"{chance} to be shown within {_format_amount(claim.margin, claim)} if nothing changes"
    least, most = (detectable(spread, seeds, at) for at in (ALPHA, level))
    said = [f"80 % for a change of {_format_amount(least, claim)} at best, {_format_amount(most, claim)} at worst"]
    if display_scale(claim.measure) == 100:
        said += [
            f"{_range(change, spread, seeds, level)} for {_format_amount(change, claim)}" for change in (0.01, 0.02)
        ]
    return ", ".join(said)


def _format_amount(value: float, claim: ClaimConfig) -> str:
    """In the unit in which the report shows the measure."""
    shown = f"{display_scale(claim.measure) * value:.3g}"
    if display_scale(claim.measure) != 100:
        return f"{shown} of its unit"
    return f"{shown} point" if shown == "1" else f"{shown} points"


def _range(effect: float, spread: float, seeds: int, level: float) -> str:
    """The power at worst and at best under Holm's method."""
    chances = [f"{100 * power(effect, spread, seeds, at):.0f}" for at in sorted({ALPHA, level})]
    return " to ".join(dict.fromkeys(chances)) + " %"
