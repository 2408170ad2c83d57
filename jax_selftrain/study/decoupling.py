"""The decoupling verdict: is verbatim text forgotten beyond general damage?

Greedy reproduction is fragile: weight noise breaks most of it. Forgetting is a larger loss of exact match than noise of
at least the same damage causes. For each seed, the control is the arm of kind `noise` with the smallest loss on
held-out text that is not below the student's. A student is **decoupled** if over seeds (one-sided t, each at .05) exact
match and mean p_z are below the control's and mean p_z has fallen. (The mean of log p_z depends on sequences that were
never memorized.) Damage is measured on the text that the base predicts best. With fewer than five seeds or without a
control of enough damage, the verdict is **not tested**.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import scipy

from jax_selftrain.stats import estimators
from jax_selftrain.stats.noninferiority import ALPHA, HEADLINE
from jax_selftrain.study.measure_names import reference_text

Cells = Sequence[Mapping[str, Any]]

DECOUPLED, NOT_SHOWN, NOT_TESTED = "decoupled", "not shown", "not tested"


def judge_decoupling(cells: Cells, controls: Sequence[str]) -> list[dict[str, Any]]:
    """Judge every student and treatment: verdict, reason and three differences.

    Args:
        cells: `cells` of `results.json`.
        controls: names of the arms of kind `noise`.
    """
    found = []
    for student, treatment in dict.fromkeys((cell["student"], cell["treatment"]) for cell in cells):
        if treatment not in controls:
            own = [cell for cell in cells if cell["student"] == student]
            found.append({"student": student, "treatment": treatment, **_judge(own, treatment, controls)})
    return found


def _judge(cells: Cells, treatment: str, controls: Sequence[str]) -> dict[str, Any]:
    members = [cell for cell in cells if cell["treatment"] == treatment]
    loss = reference_text({name: measure["before"]["value"] for name, measure in members[0]["measures"].items()})
    if loss is None or "exact_match" not in members[0]["measures"]:
        return _verdict(NOT_TESTED, "there is no held-out text or no extraction set.")
    differences: dict[str, list[float]] = {"exact_match": [], "pz": [], "pz_change": []}
    chosen = []
    for cell in members:
        noisy = [one for one in cells if one["treatment"] in controls and one["seed"] == cell["seed"]]
        worse = [one for one in noisy if _student_level(one, loss) >= _student_level(cell, loss)]
        if not worse:
            return _verdict(NOT_TESTED, f"no control is as damaged as the student of seed {cell['seed']}.")
        control = min(worse, key=lambda one: _student_level(one, loss))
        chosen.append(control["treatment"])
        for measure in ("exact_match", "pz"):
            differences[measure].append(_student_level(cell, measure) - _student_level(control, measure))
        differences["pz_change"].append(cell["measures"]["pz"]["change"]["value"])
    estimates = {name: estimators.mean(values) for name, values in differences.items()}
    described = {name: asdict(estimate) for name, estimate in estimates.items()} | {
        "controls": list(dict.fromkeys(chosen))
    }
    if len(members) < HEADLINE:
        return (
            _verdict(NOT_TESTED, f"{len(members)} seed{'s' * (len(members) > 1)}; a verdict needs {HEADLINE}.")
            | described
        )
    names = {
        "exact_match": "exact match is not below the control's",
        "pz": "mean p_z is not below the control's",
        "pz_change": "mean p_z has not fallen",
    }
    failed = [text for name, text in names.items() if _p_less_than_zero(differences[name]) > ALPHA]
    if failed:
        return _verdict(NOT_SHOWN, f"{' and '.join(failed)}.") | described
    return _verdict(DECOUPLED, "extraction is below the controls at no less damage, and p_z falls.") | described


def _verdict(verdict: str, reason: str) -> dict[str, Any]:
    empty: dict[str, Any] = {"exact_match": None, "pz": None, "pz_change": None, "controls": []}
    return {"verdict": verdict, "reason": reason, **empty}


def _student_level(cell: Mapping[str, Any], measure: str) -> float:
    return float(cell["measures"][measure]["after"]["value"])


def _p_less_than_zero(values: Sequence[float]) -> float:
    """Return the one-sided p of a mean below zero."""
    if max(values) - min(values) < 1e-12:
        return 0.0 if values[0] < -1e-12 else 1.0
    p = float(scipy.stats.ttest_1samp(values, 0.0, alternative="less").pvalue)
    return 1.0 if math.isnan(p) else p
