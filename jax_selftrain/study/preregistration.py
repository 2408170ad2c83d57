"""Claims that are declared before the first run: verdicts and power.

A claim names an estimand (the change of a measure by a treatment of a student, against the base or another treatment;
or a difference of relations, `contrasts`), a direction and, for preservation, a margin. `registration` freezes claims
and design at the first run. Each claim has two one-sided tests at .025, so that a verdict of either kind is wrong with
probability .05 at most, and none contradicts its 95 % interval. *Preserves* is non-inferiority:
supported if the loss is smaller than the margin, contradicted if larger.

The power depends on how much the difference varies over seeds, which only a pilot can show. Holm's method shares the
level among the primary claims: a claim is tested at a fraction of the level at worst, and at the full level at best.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from jax_selftrain.config import ArmConfig, ClaimConfig, ModelConfig, StudyConfig, yaml_io
from jax_selftrain.config.yaml_io import did_you_mean
from jax_selftrain.errors import InputError
from jax_selftrain.evals.extraction import CLASSES
from jax_selftrain.stats import noninferiority
from jax_selftrain.stats.estimators import Effect
from jax_selftrain.stats.noninferiority import HEADLINE, minimum_detectable_effect, power
from jax_selftrain.study.contrasts import (
    Contrast,
    ItemChanges,
    Pairs,
    contrast_effect,
    parse_contrast,
    relation_contrast,
)
from jax_selftrain.study.measure_names import (
    AFTER_RELEARNING,
    EMITTED,
    FORMATTED,
    HELD_OUT,
    MAIN_EFFECT,
    Cells,
    display_scale,
)
from jax_selftrain.study.proxy_relations import SOURCES_FOR_ABSENCE
from jax_selftrain.study.registration import PILOT_SEEDS, Registration

VERDICT_ALPHA = 0.025
"""Level of each of the two one-sided tests of a claim or a control arm."""
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
        related, preserves = parse_contrast(claim.treatment) is not None, claim.direction == "preserves"
        problems = {
            "`treatment` is required: an arm, `source NAME`, or `RELATION - RELATION`": not claim.treatment,
            "`student` is required, except for a difference of relations": not (related or claim.student),
            "a difference of relations has no `comparator` and no margin": related
            and bool(claim.comparator or preserves),
            "`margin` is required for direction `preserves`, and for no other": preserves != (claim.margin is not None),
            "`at_least` is for directions `raises` and `lowers`": preserves and claim.at_least is not None,
            "`requires` must name other claims of the study": not {*claim.requires} <= {*names} - {claim.name},
            "a claim that is required by another one cannot have `requires`": bool(claim.requires)
            and any(claim.name in one.requires for one in config.claims),
        }
        refuse_first(f"claims: {claim.name}", problems)
        refuse_first(f"claims: {claim.name}", _untestable(config, claim))
    if sum(claim.primary for claim in config.claims) > PRIMARY_FAMILY:
        raise InputError(f"claims: at most {PRIMARY_FAMILY} can be primary; set `primary: false` for the others")


def _untestable(config: StudyConfig, claim: ClaimConfig) -> dict[str, bool]:
    """Return reasons not to test a claim, and whether they hold."""
    students = config.students or tuple(model.name for model in config.models)
    sources, arms = config.sources or students, {arm.name: arm for arm in config.arms}
    treatments = [f"{MAIN_EFFECT}{source}" for source in sources] + [*arms]
    named = [one for one in (claim.treatment, claim.comparator) if one and parse_contrast(one) is None]
    kind, _, part = claim.measure.partition("/")
    memorization, is_probe = config.memorization, kind in ("exact_match", "log_pz", "pz")
    formats = [f"{FORMATTED}{one.name}" for one in memorization.formats]
    unclassed = [one for one in named if one in arms and arms[one].kind == "noise" and claim.student not in sources]
    problems = {f"{one!r} is not a treatment{did_you_mean(one, treatments)}": one not in treatments for one in named}
    return problems | {
        f"{claim.student!r} is not a student": bool(claim.student) and claim.student not in students,
        f"`{claim.measure}` needs extract.sequences": is_probe and not config.extract.sequences,
        f"`{claim.measure}` needs score.tasks": kind in ("accuracy", "task", "log_odds") and not config.score.tasks,
        f"`{claim.measure}` needs score.texts": kind == "text" and not config.score.texts,
        f"`{claim.measure}` needs an arm of kind `decontaminated`": is_probe
        and part in (HELD_OUT, EMITTED)
        and all(arm.kind != "decontaminated" for arm in config.arms),
        f"memorization.formats has no such format; it has {', '.join(formats) or 'none'}": part.startswith(FORMATTED)
        and part not in formats,
        f"`{claim.measure}` needs memorization.relearn_corpus": part == AFTER_RELEARNING
        and not memorization.relearn_corpus,
        "noise has no corpus: its sequences are classed by the student's own text, which is no source": is_probe
        and part in CLASSES
        and bool(unclassed),
        "its two arms differ in more than one option": _count_differences(claim, arms) > 1,
    }


def _count_differences(claim: ClaimConfig, arms: Mapping[str, ArmConfig]) -> int:
    """Count the options in which two arms of one kind differ."""
    pair = [arms[name] for name in (claim.treatment, claim.comparator) if name in arms]
    if len(pair) < 2 or pair[0].kind != pair[1].kind:
        return 0
    return sum(getattr(pair[0], field.name) != getattr(pair[1], field.name) for field in fields(ArmConfig)) - 1


def refuse_first(where: str, problems: Mapping[str, bool]) -> None:
    """Raise InputError for the first problem that is present."""
    for problem, is_present in problems.items():
        if is_present:
            raise InputError(f"{where}: {problem}")


def judge_claims(
    config: StudyConfig,
    cells: Cells,
    contrasts: Sequence[Contrast | None],
    registration: Registration,
    items: ItemChanges | None = None,
) -> list[dict[str, Any]]:
    """Judge each claim, also withdrawn ones: verdict, reason, effect, p-values, seeds.

    Only declared seeds that are not a pilot's count. A primary claim that was withdrawn or changed stays in the family
    that Holm's method corrects. After a change of the declared design, all claims are exploratory.

    Args:
      cells: of all seeds.
      contrasts: estimand of each of the study's claims, then of each withdrawn one (`claim_contrasts`).
      registration: what the study declared at its first run.
      items: changes of the items.
    """
    cells = [cell for cell in cells if cell["seed"] in registration.seeds and cell["seed"] not in PILOT_SEEDS]
    claims = [*config.claims, *registration.withdrawn]
    late = [claim.name in registration.post_hoc for claim in config.claims] + [False] * len(registration.withdrawn)
    effects = [estimate_claim(claim, cells, one, items) for claim, one in zip(claims, contrasts, strict=True)]
    single = [_tests(claim, effect) for claim, effect in zip(claims, effects, strict=True)]
    # All required claims must pass, each at the full level; if one is contradicted, all together are.
    first = {claim.name: n for n, claim in reversed(list(enumerate(claims)))}
    parts = [[n, *(first[one] for one in claim.requires if one in first)] for n, claim in enumerate(claims)]
    tests = [
        (max(single[k][0] for k in found), min(1.0, len(found) * min(single[k][1] for k in found))) for found in parts
    ]
    primary = [claim.primary and not is_late for claim, is_late in zip(claims, late, strict=True)]
    adjusted = [adjust_p_values(side, primary) for side in zip(*tests, strict=True)]
    changed = "".join(f" Changed since the first run: {one}." for one in registration.deviations)
    found = []
    for n, (claim, effect) in enumerate(zip(claims, effects, strict=True)):
        p, opposite = adjusted[0][n], adjusted[1][n]
        verdict, reason = "withdrawn", "it was declared at the first run and is no longer in the configuration."
        if n < len(config.claims):
            for k in reversed(parts[n]):
                verdict, reason = _decide(config, claims[k], cells, effects[k], p, opposite)
                if verdict in ("not tested", "assay insensitive"):
                    break
        found.append(
            {
                **yaml_io.to_dict(claim),
                "verdict": verdict,
                "reason": reason + changed,
                "evidence_level": "primary" if primary[n] and not changed else "exploratory",
                "post_hoc": late[n],
                "seeds": effect.n if effect else 0,
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


def claim_contrasts(
    claims: Iterable[ClaimConfig], models: Mapping[str, ModelConfig], pairs: Pairs, stronger: Pairs
) -> list[Contrast | None]:
    """Return the estimand of each claim; None if it cannot be estimated."""
    found: list[Contrast | None] = []
    for claim in claims:
        relations = parse_contrast(claim.treatment)
        if relations:
            found.append(relation_contrast(models, pairs, stronger, relations, claim.student))
        else:
            comparator = {(claim.student, claim.comparator): -1.0} if claim.comparator else {}
            found.append({(claim.student, claim.treatment): 1.0} | comparator)
    return found


def estimate_claim(
    claim: ClaimConfig, cells: Cells, contrast: Contrast | None, items: ItemChanges | None = None
) -> Effect | None:
    """Estimate a claim's estimand; None if a cell or measure is missing."""
    return None if contrast is None else contrast_effect(cells, contrast, claim.measure, items or {})


def _tests(claim: ClaimConfig, effect: Effect | None) -> tuple[float, float]:
    """Return one-sided p-values of the claim and of its opposite."""
    if effect is None or effect.n < 2 or effect.stderr == 0:
        return 1.0, 1.0
    lower_is_better = claim.measure.startswith("text/")
    threshold = (claim.margin or 0.0) * (1.0 if lower_is_better else -1.0)
    if claim.at_least is not None:
        threshold = claim.at_least if claim.direction == "raises" else -claim.at_least
    pair = effect.p_greater(threshold), effect.p_less(threshold)
    is_fall = lower_is_better if claim.direction == "preserves" else claim.direction == "lowers"
    return pair[::-1] if is_fall else pair


def _decide(
    config: StudyConfig, claim: ClaimConfig, cells: Cells, effect: Effect | None, p: float, opposite: float
) -> tuple[str, str]:
    if effect is None:
        return "not tested", "the study does not have these cells or this measure."
    if effect.n < HEADLINE:
        return "not tested", f"{effect.n} seed{'s' if effect.n > 1 else ''}; a verdict needs {HEADLINE}."
    if effect.stderr == 0:
        return "not tested", "all seeds agree exactly: they are not independent."
    if failed := _failed_control(config, claim, cells):
        return "assay insensitive", failed
    words = f"p = {p:.3g} after correction over {effect.n} seeds"
    if p < VERDICT_ALPHA:
        return "supported", f"{words}."
    if opposite < VERDICT_ALPHA:
        return "contradicted", f"the opposite has p = {opposite:.3g} after correction over {effect.n} seeds."
    return "cannot tell", f"{words}, and the opposite has {opposite:.3g}."


def _controls(config: StudyConfig, claim: ClaimConfig) -> tuple[str, str, tuple[str, ...]] | None:
    """Return the option, verb and arms of a claim's controls, or None.

    Only claims about capabilities need one. That a capability is raised takes an arm that can raise it; that it is
    kept, lowered or better with one source than another, an arm with a known harm.
    """
    if not claim.measure.startswith(("accuracy", "task/", "log_odds")):
        return None
    if claim.direction == "raises" and parse_contrast(claim.treatment) is None:
        return "positive_controls", "raise", config.positive_controls
    return "negative_controls", "lower", config.negative_controls


def _failed_control(config: StudyConfig, claim: ClaimConfig, cells: Cells) -> str:
    """Return the reason that a control arm failed, or an empty string."""
    controls = _controls(config, claim)
    if controls is None:
        return ""
    option, verb, arms = controls
    for student in [claim.student] if claim.student else list(dict.fromkeys(cell["student"] for cell in cells)):
        effects = {arm: contrast_effect(cells, {(student, arm): 1.0}, claim.measure, {}) for arm in arms}
        if not any(effects.values()):
            return f"{student} has no arm in {option} with this measure."
        for arm, effect in effects.items():
            p = 0.0 if effect is None else effect.p_greater(0.0) if verb == "raise" else effect.p_less(0.0)
            if not p < VERDICT_ALPHA:
                return f"{arm} did not {verb} {claim.measure} of {student} (p = {p:.3g})."
    return ""


def check_contrasts(claims: Sequence[ClaimConfig], models: Mapping[str, ModelConfig], pairs: Pairs) -> None:
    """Refuse differences of relations that a design cannot estimate. Raises InputError."""
    possible = [claim_contrasts(claims, models, pairs, stronger) for stronger in ((), pairs)]
    for claim, *found in zip(claims, *possible, strict=True):
        problem = f"`{claim.treatment}` cannot be estimated from these pairs of student and source"
        refuse_first(f"claims: {claim.name}", {problem: found == [None, None]})


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
        f"power of one-sided tests over {seeds} seeds at {VERDICT_ALPHA:g}, with Holm's method for {primary} primary "
        "claims, on these items:"
    ]
    for claim, contrast in zip(config.claims, contrasts, strict=True):
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
                text += _describe_effects(claim, stddev, seeds, alpha) + gate
            lines.append(f"  {claim.name}: {text}")
    if config.proxy_sample_size and 1 < len(sources) < SOURCES_FOR_ABSENCE:
        lines.append(f"  proxies: {len(sources)} sources; that one is unrelated takes {SOURCES_FOR_ABSENCE}")
    return lines


def _describe_gate(config: StudyConfig, claim: ClaimConfig, cells: Cells) -> str:
    """Describe the probability that the control arms of a claim pass."""
    controls = _controls(config, claim)
    if controls is None:
        return ""
    option, verb, arms = controls
    chance, known = 1.0, False
    for arm in arms:
        for student in [claim.student] if claim.student else list(dict.fromkeys(cell["student"] for cell in cells)):
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
