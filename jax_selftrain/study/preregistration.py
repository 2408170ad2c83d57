"""Claims that are declared before the first run, and their verdicts.

A claim names an estimand (the change of a measure by a treatment of a student, against the base or another treatment;
or the interaction), a direction and, for preservation, a margin. The claims of a study are frozen in `claims.json` at
its first run; a claim that differs from them is *post hoc* and stays labeled so.

| verdict | condition |
|---|---|
| not tested | a cell is missing, or there are fewer than five seeds |
| assay insensitive | a control arm did not change a capability as expected |
| supported | the one-sided test over seeds is below .05 after Holm's correction over the primary claims |
| contradicted | the opposite test is |
| cannot tell | otherwise |

Tests are Student's t over seeds. *Preserves* is non-inferiority: supported if the loss is smaller than the margin,
contradicted if it is larger. Exploratory and post hoc claims are corrected by Benjamini and Hochberg's method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain.config import ClaimConfig, StudyConfig, yaml_io
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.io.manifest import hash_json
from jax_selftrain.stats.estimators import Effect
from jax_selftrain.stats.noninferiority import ALPHA, HEADLINE, benjamini_hochberg, holm
from jax_selftrain.stats.standard_errors import mean_and_stderr

INTERACTION = "home - away"
"""Treatment of a claim about the interaction."""
PRIMARY_FAMILY = 3
"""Maximum number of primary claims."""

Cells = Sequence[Mapping[str, Any]]


def check_claims(config: StudyConfig) -> None:
    """Refuse claims with missing or conflicting options. Raises InputError."""
    names = [claim.name for claim in config.claims]
    for claim in config.claims:
        where = f"claims: {claim.name}"
        if not claim.name or names.count(claim.name) > 1:
            raise InputError("claims: each needs a unique `name`")
        if not claim.treatment:
            raise InputError(f"{where}: `treatment` is required: an arm, `source NAME`, or `{INTERACTION}`")
        if (claim.treatment == INTERACTION) == bool(claim.student):
            raise InputError(f"{where}: `student` is required, except for `{INTERACTION}`, which has none")
        if claim.treatment == INTERACTION and (claim.comparator or claim.direction == "preserves"):
            raise InputError(f"{where}: the interaction is a contrast; it has no `comparator` and no margin")
        if (claim.direction == "preserves") != (claim.margin is not None):
            raise InputError(f"{where}: `margin` is required for direction `preserves`, and for no other")
        if claim.margin is not None and not 0 < claim.margin < math.inf:
            raise InputError(f"{where}: the margin is {claim.margin}; it must be a positive number")
    if sum(claim.primary for claim in config.claims) > PRIMARY_FAMILY:
        raise InputError(f"claims: at most {PRIMARY_FAMILY} can be primary; set `primary: false` for the others")


def freeze_claims(folder: Path, claims: Sequence[ClaimConfig]) -> list[str]:
    """Freeze the first run's claims; return the names of post hoc claims.

    A study that started without claims has frozen an empty list.

    Raises:
        InputError: the frozen claims were changed, or another version wrote them.
    """
    path = folder / "claims.json"
    now = [yaml_io.to_dict(claim) for claim in claims]
    if not path.exists():
        declared = [] if (folder / "results.json").exists() else now
        atomic.write_json(path, {"claims": declared, "sha256": hash_json(declared)})
        return [claim["name"] for claim in now if claim not in declared]
    frozen = atomic.read_json(path)
    if not isinstance(frozen, dict) or hash_json(frozen.get("claims")) != frozen.get("sha256"):
        raise InputError(f"{path}: was changed after it was written; restore it")
    if any(claim.keys() != yaml_io.to_dict(ClaimConfig()).keys() for claim in frozen["claims"]):
        raise InputError(f"{path}: has claims of another version of this program; choose another --out")
    return [claim["name"] for claim in now if claim not in frozen["claims"]]


def judge_claims(
    config: StudyConfig, cells: Cells, interaction: Mapping[str, Any] | None, post_hoc: Sequence[str]
) -> list[dict[str, Any]]:
    """Judge each claim: verdict, reason, effect, p-values, seeds."""
    differences = [claim_differences(claim, cells, interaction) for claim in config.claims]
    effects = [_effect(values) if len(values) > 1 else None for values in differences]
    tests = [_tests(claim, effect) for claim, effect in zip(config.claims, effects, strict=True)]
    primary = [claim.primary and claim.name not in post_hoc for claim in config.claims]
    adjusted = [list(pair) for pair in tests]
    for side in (0, 1):
        for correct, members in (
            (holm, [n for n, one in enumerate(primary) if one]),
            (benjamini_hochberg, [n for n, one in enumerate(primary) if not one]),
        ):
            for n, p in zip(members, correct([tests[n][side] for n in members]), strict=True):
                adjusted[n][side] = p
    found = []
    for n, claim in enumerate(config.claims):
        effect, seeds = effects[n], len(differences[n])
        verdict, reason = _decide(config, claim, cells, seeds, effect, *adjusted[n])
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
                "p_adjusted": adjusted[n][0] if effect else None,
            }
        )
    return found


def claim_differences(claim: ClaimConfig, cells: Cells, interaction: Mapping[str, Any] | None) -> list[float]:
    """Return the estimand of each seed; empty if anything is missing."""
    if claim.treatment == INTERACTION:
        found = (interaction or {"measures": {}})["measures"].get(claim.measure)
        return list(found["seeds"]) if found else []
    change = _paired_changes(cells, claim.student, claim.treatment, claim.measure)
    if not claim.comparator:
        return list(change.values())
    comparator = _paired_changes(cells, claim.student, claim.comparator, claim.measure)
    return [change[seed] - comparator[seed] for seed in change] if change.keys() == comparator.keys() else []


def _paired_changes(cells: Cells, student: str, treatment: str, measure: str) -> dict[int, float]:
    members = [cell for cell in cells if (cell["student"], cell["treatment"]) == (student, treatment)]
    if not all(measure in cell["measures"] for cell in members):
        return {}
    return {cell["seed"]: cell["measures"][measure]["change"]["value"] for cell in members}


def _effect(values: Sequence[float]) -> Effect:
    value, error = mean_and_stderr(np.asarray(values, np.float64))
    return Effect(value, value, math.inf if error is None else error, len(values) - 1, len(values))


def _tests(claim: ClaimConfig, effect: Effect | None) -> tuple[float, float]:
    """Return one-sided p-values of the claim and of its opposite."""
    if effect is None:
        return 1.0, 1.0
    if claim.direction == "preserves":
        margin = claim.margin or 0.0
        if _lower_is_better(claim.measure):
            return effect.p_less(margin), effect.p_greater(margin)
        return effect.p_greater(-margin), effect.p_less(-margin)
    pair = effect.p_greater(0.0), effect.p_less(0.0)
    return pair if claim.direction == "raises" else pair[::-1]


def _lower_is_better(measure: str) -> bool:
    return measure.startswith("text/")


def _decide(
    config: StudyConfig, claim: ClaimConfig, cells: Cells, seeds: int, effect: Effect | None, p: float, opposite: float
) -> tuple[str, str]:
    if seeds == 0:
        return "not tested", "the study does not have these cells or this measure."
    if seeds < HEADLINE or effect is None:
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
        for option, wanted in (("positive_controls", 1.0), ("negative_controls", -1.0)):
            arms = getattr(config, option)
            own = [arm for arm in arms if _paired_changes(cells, student, arm, claim.measure)]
            if not own:
                return f"{student} has no arm in {option} with this measure."
            for arm in own:
                effect = _effect([wanted * x for x in _paired_changes(cells, student, arm, claim.measure).values()])
                if not effect.p_greater(0.0) < ALPHA:
                    verb = "raise" if wanted > 0 else "lower"
                    return f"{arm} did not {verb} {claim.measure} of {student} (p = {effect.p_greater(0.0):.3g})."
    return ""
