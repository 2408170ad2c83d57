"""Claims that are declared before the first run: verdicts and power.

A claim names an estimand (the change of a measure by a treatment of a student, against the base or another treatment;
or the interaction), a direction and, for preservation, a margin. The claims of a study are frozen in `claims.json` at
its first run; a claim that differs from them is *post hoc* and stays labeled so. Tests are one-sided, by Student's t
over seeds. *Preserves* is non-inferiority: supported if the loss is smaller than the margin, contradicted if larger.

The power depends on how much the difference varies over seeds, which only a pilot can show. Holm's method shares the
level among the primary claims: a claim is tested at a fraction of the level at worst, and at the full level at best.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain.config import ClaimConfig, StudyConfig, yaml_io
from jax_selftrain.errors import InputError
from jax_selftrain.evals.item_results import Split
from jax_selftrain.io import atomic
from jax_selftrain.io.manifest import hash_json
from jax_selftrain.stats import noninferiority
from jax_selftrain.stats.estimators import Effect, mean_effect
from jax_selftrain.stats.noninferiority import ALPHA, HEADLINE, minimum_detectable_effect, power
from jax_selftrain.study.measure_names import Cells, display_scale, group_cells, seed_values

INTERACTION = "home - away"
"""Treatment of a claim about the interaction."""
PRIMARY_FAMILY = 3
"""Maximum number of primary claims."""
ASSUMED_STDDEVS: tuple[float, ...] = (0.005, 0.01)
"""Standard deviations of an accuracy over seeds: half a point and one point."""


def check_claims(config: StudyConfig) -> None:
    """Refuse claims with missing or conflicting options. Raises InputError."""
    names = [claim.name for claim in config.claims]
    for claim in config.claims:
        if not claim.name or names.count(claim.name) > 1:
            raise InputError("claims: each needs a unique `name`")
        crossed, preserves = claim.treatment == INTERACTION, claim.direction == "preserves"
        contrasts = bool(claim.comparator or preserves)
        problems = {
            f"`treatment` is required: an arm, `source NAME`, or `{INTERACTION}`": not claim.treatment,
            f"`student` is required, except for `{INTERACTION}`, which has none": crossed == bool(claim.student),
            "the interaction is a contrast; it has no `comparator` and no margin": crossed and contrasts,
            "`margin` is required for direction `preserves`, and for no other": preserves != (claim.margin is not None),
        }
        refuse_first(f"claims: {claim.name}", problems)
    if sum(claim.primary for claim in config.claims) > PRIMARY_FAMILY:
        raise InputError(f"claims: at most {PRIMARY_FAMILY} can be primary; set `primary: false` for the others")


def refuse_first(where: str, problems: Mapping[str, bool]) -> None:
    """Raise InputError for the first problem that is present."""
    for problem, is_present in problems.items():
        if is_present:
            raise InputError(f"{where}: {problem}")


def freeze_claims(folder: Path, claims: Sequence[ClaimConfig], split: Split) -> list[str]:
    """Freeze the first run's claims; return the names of post hoc claims.

    A study that started without claims has frozen an empty list. Results on dev items are of pilots: claims about tasks
    and texts may change until test items are requested, and are post hoc after another change of the split. Raises
    InputError if the frozen claims were changed, or another version wrote them.
    """
    path = folder / "claims.json"
    now = [yaml_io.to_dict(claim) for claim in claims]
    if path.exists():
        frozen = _read_frozen(path)
        if frozen["split"] == "dev" and split in ("dev", "test"):
            kept = [claim for claim in frozen["claims"] if not _depends_on_split(claim)]
            frozen = {"claims": kept + [claim for claim in now if _depends_on_split(claim)], "split": split}
    else:
        frozen = {"claims": [] if (folder / "results.json").exists() else now, "split": split}
    atomic.write_json(path, {**frozen, "sha256": hash_json(frozen)})
    return [
        claim["name"]
        for claim in now
        if claim not in frozen["claims"] or (split != frozen["split"] and _depends_on_split(claim))
    ]


def _read_frozen(path: Path) -> dict[str, Any]:
    """Read `claims` and `split` of `claims.json`."""
    found = atomic.read_json(path)
    another = f"{path}: has claims of another version of this program; choose another --out"
    if not isinstance(found, dict) or not {"claims", "split"} <= found.keys():
        raise InputError(another)
    frozen = {name: found[name] for name in ("claims", "split")}
    if hash_json(frozen) != found.get("sha256"):
        raise InputError(f"{path}: was changed after it was written; restore it")
    if any(claim.keys() != yaml_io.to_dict(ClaimConfig()).keys() for claim in frozen["claims"]):
        raise InputError(another)
    return frozen


def _depends_on_split(claim: Mapping[str, Any]) -> bool:
    """Return True for a claim about tasks or texts."""
    return claim["measure"].partition("/")[0] in ("accuracy", "task", "log_odds", "text")


def judge_claims(
    config: StudyConfig, cells: Cells, interaction: Mapping[str, Any] | None, post_hoc: Sequence[str]
) -> list[dict[str, Any]]:
    """Judge each claim: verdict, reason, effect, p-values, seeds."""
    differences = [claim_differences(claim, cells, interaction) for claim in config.claims]
    effects = [mean_effect(values) if len(values) > 1 else None for values in differences]
    tests = [_tests(claim, effect) for claim, effect in zip(config.claims, effects, strict=True)]
    primary = [claim.primary and claim.name not in post_hoc for claim in config.claims]
    adjusted = [adjust_p_values(side, primary) for side in zip(*tests, strict=True)]
    found = []
    for n, (claim, effect) in enumerate(zip(config.claims, effects, strict=True)):
        seeds, p, opposite = len(differences[n]), adjusted[0][n], adjusted[1][n]
        verdict, reason = _decide(config, claim, cells, seeds, p, opposite)
        found.append(
            {
                **yaml_io.to_dict(claim),
                "verdict": verdict,
                "reason": reason,
                "evidence_level": "primary" if primary[n] else "exploratory",
                "post_hoc": claim.name in post_hoc,
                "seeds": seeds,
                "effect": asdict(effect.estimate()) if effect else None,
                "p": tests[n][0] if effect else None,
                "p_adjusted": p if effect else None,
            }
        )
    return found


def adjust_p_values(p_values: Sequence[float], primary: Sequence[bool]) -> list[float]:
    """Correct primary p-values by Holm, others by Benjamini and Hochberg."""
    adjusted, is_primary = np.array(p_values, np.float64), np.array(primary, bool)
    for correct, members in ((noninferiority.holm, is_primary), (noninferiority.benjamini_hochberg, ~is_primary)):
        adjusted[members] = correct(adjusted[members].tolist())
    return adjusted.tolist()


def claim_differences(claim: ClaimConfig, cells: Cells, interaction: Mapping[str, Any] | None) -> list[float]:
    """Return the estimand of each seed; empty if anything is missing."""
    if claim.treatment == INTERACTION:
        found = (interaction or {"measures": {}})["measures"].get(claim.measure)
        return list(found["seeds"]) if found else []
    change = _changes(cells, claim.student, claim.treatment, claim.measure)
    if not claim.comparator:
        return list(change.values())
    comparator = _changes(cells, claim.student, claim.comparator, claim.measure)
    return [change[seed] - comparator[seed] for seed in change] if change.keys() == comparator.keys() else []


def _changes(cells: Cells, student: str, treatment: str, measure: str) -> dict[int, float]:
    return seed_values(group_cells(cells).get((student, treatment), []), measure)


def _tests(claim: ClaimConfig, effect: Effect | None) -> tuple[float, float]:
    """Return one-sided p-values of the claim and of its opposite."""
    if effect is None:
        return 1.0, 1.0
    lower_is_better = claim.measure.startswith("text/")
    threshold = (claim.margin or 0.0) * (1.0 if lower_is_better else -1.0)
    pair = effect.p_greater(threshold), effect.p_less(threshold)
    is_fall = lower_is_better if claim.direction == "preserves" else claim.direction == "lowers"
    return pair[::-1] if is_fall else pair


def _decide(
    config: StudyConfig, claim: ClaimConfig, cells: Cells, seeds: int, p: float, opposite: float
) -> tuple[str, str]:
    if seeds == 0:
        return "not tested", "the study does not have these cells or this measure."
    if seeds < HEADLINE:
        return "not tested", f"{seeds} seed{'s' if seeds > 1 else ''}; a verdict needs {HEADLINE}."
    if claim.measure.startswith(("accuracy", "task/", "log_odds")) and (failed := _assay_failed(config, claim, cells)):
        return "assay insensitive", failed
    words = f"p = {p:.3g} after correction over {seeds} seeds"
    if p < ALPHA:
        return "supported", f"{words}."
    if opposite < ALPHA:
        return "contradicted", f"the opposite has p = {opposite:.3g} after correction over {seeds} seeds."
    return "cannot tell", f"{words}, and the opposite has {opposite:.3g}."


def _assay_failed(config: StudyConfig, claim: ClaimConfig, cells: Cells) -> str:
    """Return the reason that a control arm failed, or an empty string."""
    students = [claim.student] if claim.student else list(dict.fromkeys(cell["student"] for cell in cells))
    for student in students:
        for option, verb in (("positive_controls", "raise"), ("negative_controls", "lower")):
            changes = {arm: _changes(cells, student, arm, claim.measure) for arm in getattr(config, option)}
            if not any(changes.values()):
                return f"{student} has no arm in {option} with this measure."
            for arm, by_seed in changes.items():
                effect = mean_effect(list(by_seed.values())) if by_seed else None
                p = 0.0 if effect is None else effect.p_greater(0.0) if verb == "raise" else effect.p_less(0.0)
                if not p < ALPHA:
                    return f"{arm} did not {verb} {claim.measure} of {student} (p = {p:.3g})."
    return ""


def describe_power(config: StudyConfig, earlier: Mapping[str, Any] | None = None) -> list[str]:
    """Return lines that say what each claim can find.

    `earlier` is the `results.json` of a pilot or of fewer seeds.
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
        values = claim_differences(claim, earlier["cells"], earlier["interaction"]) if earlier else []
        stddevs, source = ASSUMED_STDDEVS, "assumed"
        if len(values) > 1:
            stddevs, source = (float(np.std(values, ddof=1)),), "measured"
        elif display_scale(claim.measure) != 100:
            lines.append(f"  {claim.name}: its standard deviation over seeds is unknown without a pilot")
            continue
        for stddev in stddevs:
            text = "the seeds of the earlier run agree exactly, so the power cannot be computed"
            if stddev:
                text = f"with a standard deviation of {_format_amount(stddev, claim)} ({source}), "
                text += _describe_effects(claim, stddev, seeds, alpha)
            lines.append(f"  {claim.name}: {text}")
    return lines


def _describe_effects(claim: ClaimConfig, stddev: float, seeds: int, alpha: float) -> str:
    def chance(effect: float) -> str:
        """Format the power at worst and at best under Holm's method."""
        chances = [f"{100 * power(effect, stddev, seeds, level):.0f}" for level in sorted({ALPHA, alpha})]
        return " to ".join(dict.fromkeys(chances)) + " %"

    if claim.margin is not None:
        return (
            f"{chance(claim.margin)} to show a change within {_format_amount(claim.margin, claim)} if nothing changes"
        )
    least, most = (_format_amount(minimum_detectable_effect(stddev, seeds, level), claim) for level in (ALPHA, alpha))
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
