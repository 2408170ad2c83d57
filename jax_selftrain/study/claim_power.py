"""Power of the claims of a study, for `--dry-run`.

The power depends on how much the difference varies over seeds, which only a pilot can show. Holm's method shares the
level among the primary claims: a claim is tested at a fraction of the level at worst, and at the full level at best.
"""

import math
from collections.abc import Mapping
from typing import Any

from jax_selftrain.config import ClaimConfig, ModelConfig, StudyConfig
from jax_selftrain.stats.noninferiority import HEADLINE, minimum_detectable_effect, power
from jax_selftrain.study.contrasts import Pairs, contrast_effect
from jax_selftrain.study.measure_names import Cells, display_scale
from jax_selftrain.study.preregistration import (
    VERDICT_ALPHA,
    claim_contrasts,
    claim_controls,
    claim_students,
    estimate_claim,
)
from jax_selftrain.study.proxy_relations import SOURCES_FOR_ABSENCE

ASSUMED_STDDEVS: tuple[float, ...] = (0.005, 0.01)
"""Standard deviations of an accuracy over seeds: half a point and one point."""


def describe_power(
    config: StudyConfig,
    models: Mapping[str, ModelConfig],
    pairs: Pairs,
    earlier: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return lines that say what each claim can find.

    `earlier` is the `results.json` of a pilot or of fewer seeds; without it, sources of other lineages count as
    stronger.
    """
    known = earlier["relations"]["stronger"] if earlier and earlier["relations"] else pairs
    contrasts = claim_contrasts(config.claims, models, pairs, {(student, source) for student, source in known})
    seeds, primary = len(config.seeds), sum(claim.primary for claim in config.claims)
    if not config.claims:
        return ["no claims are declared: there will be no verdicts"]
    if seeds < HEADLINE:
        return [f"no claim gets a verdict with {seeds} seed{'s' * (seeds > 1)}: a verdict needs {HEADLINE}"]
    sources = {source for _, source in pairs}
    lines = [
        f"power of one-sided tests over {seeds} seeds, or the bases of a claim, at {VERDICT_ALPHA:g}, with Holm's "
        f"method for {primary} primary claims, on these items:"
    ]
    for claim, contrast in zip(config.claims, contrasts, strict=True):
        units = len(claim.bases) or seeds
        alpha = VERDICT_ALPHA / max(primary, 1) if claim.primary else VERDICT_ALPHA
        effect = estimate_claim(claim, earlier["cells"], contrast) if earlier else None
        stddevs, source = ASSUMED_STDDEVS, "assumed"
        if effect and effect.n > 1:
            stddevs, source = (effect.stderr * math.sqrt(effect.n),), "measured"
        elif display_scale(claim.measure) != 100:
            lines.append(f"  {claim.name}: its standard deviation over seeds is unknown without a pilot")
            continue
        gate = _describe_gate(config, claim, earlier["cells"] if earlier else ())
        for stddev in stddevs:
            text = "the seeds of the earlier run agree exactly, so the power cannot be computed"
            if stddev:
                text = f"with a standard deviation of {_format_amount(stddev, claim)} ({source}), "
                text += _describe_effects(claim, stddev, units, alpha) + gate
            lines.append(f"  {claim.name}: {text}")
    if config.proxy_sample_size and 1 < len(sources) < SOURCES_FOR_ABSENCE:
        lines.append(f"  proxies: {len(sources)} sources; that one is unrelated takes {SOURCES_FOR_ABSENCE}")
    return lines


def _describe_gate(config: StudyConfig, claim: ClaimConfig, cells: Cells) -> str:
    """Describe the probability that the control arms of a claim pass."""
    controls = claim_controls(config, claim)
    if controls is None:
        return ""
    option, verb, arms = controls
    chance, known = 1.0, False
    for arm in arms:
        for student in claim_students(claim) or dict.fromkeys(cell["student"] for cell in cells):
            effect = contrast_effect(cells, {(student, arm): 1.0}, claim.measure, {})
            if effect and effect.n > 1 and effect.stderr:
                size = effect.value if verb == "raise" else -effect.value
                stddev = effect.stderr * math.sqrt(effect.n)
                chance, known = chance * power(size, stddev, len(config.seeds), VERDICT_ALPHA), True
    if known:
        return f"; times {100 * chance:.0f} % that its {option} {verb} the measure, as in the earlier run"
    return f"; times the probability that its {option} {verb} the measure, which a pilot shows"


def _describe_effects(claim: ClaimConfig, stddev: float, seeds: int, alpha: float) -> str:
    def chance(effect: float) -> str:
        """Format the power at worst and at best under Holm's method."""
        chances = [f"{100 * power(effect, stddev, seeds, level):.0f}" for level in sorted({VERDICT_ALPHA, alpha})]
        return " to ".join(dict.fromkeys(chances)) + " %"

    if claim.margin is not None:
        return (
            f"{chance(claim.margin)} to show a change within {_format_amount(claim.margin, claim)} if nothing changes"
        )
    least, most = (
        _format_amount(minimum_detectable_effect(stddev, seeds, level), claim) for level in (VERDICT_ALPHA, alpha)
    )
    parts = [f"80 % for a change of {least} at best, {most} at worst"]
    if display_scale(claim.measure) == 100:
        parts += [f"{chance(change)} for {_format_amount(change, claim)}" for change in (0.01, 0.02)]
    return ", ".join(parts)


def _format_amount(value: float, claim: ClaimConfig) -> str:
    """Format a value in the unit that the report shows."""
    shown = f"{display_scale(claim.measure) * value:.3g}"
    if display_scale(claim.measure) != 100:
        return f"{shown} of its unit"
    return f"{shown} point" if shown == "1" else f"{shown} points"
