"""The decoupling verdict: is verbatim text forgotten beyond general damage?

Greedy reproduction is fragile: weight noise breaks most of it. Forgetting is a larger loss of exact match than noise of
at least the same damage causes. For each seed, the control is the arm of kind `noise` with the smallest loss on
held-out text that is not below the student's. A student is **decoupled** if over seeds (one-sided t, each at .05) exact
match and mean p_z are below the control's and mean p_z has fallen. (The mean of log p_z depends on sequences that were
never memorized.) Damage is measured on the text that the base predicts best. With fewer than five seeds or without a
control of enough damage, the verdict is **not tested**.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from jax_selftrain.stats import estimators
from jax_selftrain.stats.noninferiority import ALPHA, HEADLINE
from jax_selftrain.study.measure_names import Cells, group_cells, reference_text

DECOUPLED, NOT_SHOWN, NOT_TESTED = "decoupled", "not shown", "not tested"
FAILURES = {
    "exact_match": "exact match is not below the control's",
    "pz": "mean p_z is not below the control's",
    "pz_change": "mean p_z has not fallen",
}
"""The three differences, and the reason if one is not below zero."""
ROUNDING = 1e-12
"""A change of this size is none."""


def judge_decoupling(cells: Cells, controls: Sequence[str]) -> list[dict[str, Any]]:
    """Judge every student and treatment: verdict, reason and three differences.

    `controls` names the arms of kind `noise`.
    """
    found = []
    for (student, treatment), members in group_cells(cells).items():
        if treatment not in controls:
            noisy = [cell for cell in cells if cell["student"] == student and cell["treatment"] in controls]
            verdict, reason, differences = _judge(members, noisy)
            entry = {"student": student, "treatment": treatment, "verdict": verdict, "reason": reason}
            found.append({**entry, **dict.fromkeys(FAILURES), "controls": [], **differences})
    return found


def _judge(members: Cells, noisy: Cells) -> tuple[str, str, dict[str, Any]]:
    loss = reference_text({name: measure["before"]["value"] for name, measure in members[0]["measures"].items()})
    if loss is None or "exact_match" not in members[0]["measures"]:
        return NOT_TESTED, "there is no held-out text or no extraction set.", {}
    rows, chosen = [], []
    for cell in members:
        own = cell["measures"]
        others = [one for one in noisy if one["seed"] == cell["seed"]]
        worse = [one for one in others if _after(one["measures"], loss) >= _after(own, loss)]
        if not worse:
            return NOT_TESTED, f"no control is as damaged as the student of seed {cell['seed']}.", {}
        control = min(worse, key=lambda one: _after(one["measures"], loss))
        chosen.append(control["treatment"])
        gaps = [_after(own, name) - _after(control["measures"], name) for name in ("exact_match", "pz")]
        rows.append([*gaps, own["pz"]["change"]["value"]])
    differences = dict(zip(FAILURES, zip(*rows, strict=True), strict=True))
    found: dict[str, Any] = {name: asdict(estimators.mean(values)) for name, values in differences.items()}
    found["controls"] = list(dict.fromkeys(chosen))
    if len(members) < HEADLINE:
        return NOT_TESTED, f"{len(members)} seed{'s' * (len(members) > 1)}; a verdict needs {HEADLINE}.", found
    effects = {name: estimators.mean_effect(values) for name, values in differences.items()}
    failed = [FAILURES[name] for name, effect in effects.items() if effect.p_less(-ROUNDING) > ALPHA]
    if failed:
        return NOT_SHOWN, f"{' and '.join(failed)}.", found
    return DECOUPLED, "extraction is below the controls at no less damage, and p_z falls.", found


def _after(measures: Mapping[str, Any], name: str) -> float:
    return float(measures[name]["after"]["value"])
