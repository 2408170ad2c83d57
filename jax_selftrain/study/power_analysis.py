"""Power of the tests of a study's claims, printed by `study --dry-run`.

A claim is tested by a one-sided t-test over seeds. Its power depends on how much the difference varies over seeds,
which only a pilot can show. Without a pilot, two typical standard deviations are assumed. Holm's method shares the
level among the primary claims: a claim is tested at a fraction of the level at worst, and at the full level at best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jax_selftrain.config import ClaimConfig, StudyConfig
from jax_selftrain.stats.noninferiority import ALPHA, HEADLINE
from jax_selftrain.stats.power import minimum_detectable_effect, power
from jax_selftrain.study.measure_names import display_scale
from jax_selftrain.study.preregistration import claim_differences

ASSUMED_STDDEVS = (0.005, 0.01)
"""Standard deviations of an accuracy over seeds: half a point and one point."""


def describe_power(config: StudyConfig, earlier: Mapping[str, Any] | None = None) -> list[str]:
    """Describe what each claim can find.

    Args:
        config: the study.
        earlier: the `results.json` of a pilot or of fewer seeds.

    Returns:
        Lines of text.
    """
    seeds, primary = len(config.seeds), sum(claim.primary for claim in config.claims)
    if not config.claims:
        return ["no claims are declared: there will be no verdicts"]
    if seeds < HEADLINE:
        return [f"no claim gets a verdict with {seeds} seed{'s' * (seeds > 1)}: a verdict needs {HEADLINE}"]
    lines = [
        f"power of one-sided tests over {seeds} seeds at {ALPHA:g}, with Holm's method for {primary} primary claims:"
    ]
    for claim in config.claims:
        alpha = ALPHA / max(primary, 1) if claim.primary else ALPHA
        lines += [f"  {claim.name}: {line}" for line in _describe_claim(claim, seeds, alpha, _stddev(claim, earlier))]
    return lines


def _stddev(claim: ClaimConfig, earlier: Mapping[str, Any] | None) -> float | None:
    """Return the standard deviation over an earlier run's seeds, if known."""
    values = claim_differences(claim, earlier["cells"], earlier["interaction"]) if earlier else []
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _describe_claim(claim: ClaimConfig, seeds: int, alpha: float, measured: float | None) -> list[str]:
    if measured is None and display_scale(claim.measure) != 100:
        return ["its standard deviation over seeds is unknown without a pilot"]
    if measured == 0:
        return ["the seeds of the earlier run agree exactly, so the power cannot be computed"]
    stddevs: Sequence[float] = ASSUMED_STDDEVS if measured is None else (measured,)
    source = "assumed" if measured is None else "measured"
    return [
        f"with a standard deviation of {_format_amount(stddev, claim)} ({source}), "
        f"{_describe_effects(claim, stddev, seeds, alpha)}"
        for stddev in stddevs
    ]


def _describe_effects(claim: ClaimConfig, stddev: float, seeds: int, alpha: float) -> str:
    if claim.margin is not None:
        chance = _power_range(claim.margin, stddev, seeds, alpha)
        return f"{chance} to show a change within {_format_amount(claim.margin, claim)} if nothing changes"
    least, most = (minimum_detectable_effect(stddev, seeds, level) for level in (ALPHA, alpha))
    parts = [f"80 % for a change of {_format_amount(least, claim)} at best, {_format_amount(most, claim)} at worst"]
    if display_scale(claim.measure) == 100:
        parts += [
            f"{_power_range(change, stddev, seeds, alpha)} for {_format_amount(change, claim)}"
            for change in (0.01, 0.02)
        ]
    return ", ".join(parts)


def _format_amount(value: float, claim: ClaimConfig) -> str:
    """Format a value in the unit that the report shows."""
    shown = f"{display_scale(claim.measure) * value:.3g}"
    if display_scale(claim.measure) != 100:
        return f"{shown} of its unit"
    return f"{shown} point" if shown == "1" else f"{shown} points"


def _power_range(effect: float, stddev: float, seeds: int, alpha: float) -> str:
    """Format the power at worst and at best under Holm's method."""
    chances = [f"{100 * power(effect, stddev, seeds, level):.0f}" for level in sorted({ALPHA, alpha})]
    return " to ".join(dict.fromkeys(chances)) + " %"
