"""Rates of verdicts in simulated studies, by the rules of the first version and by the present ones.

`PYTHONPATH=tests python tests/study/test_verdict_rates.py 3000` runs at full size.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from claims_factory import KEEPS, OWN, SEEDS, TASKS, judge, make_study

from jax_selftrain.config import ClaimConfig
from jax_selftrain.stats.estimators import mean_effect
from jax_selftrain.stats.noninferiority import holm

VERDICTS = ("supported", "contradicted")


def make_cells(changes: dict[str, np.ndarray], measure: str) -> list[dict[str, Any]]:
    """Return cells of student A with changes [seeds] by treatment."""
    return [
        {
            **{"student": "A", "treatment": treatment, "seed": seed, "tasks": TASKS},
            "measures": {measure: {"change": {"value": float(value)}}},
        }
        for treatment, values in changes.items()
        for seed, value in zip(SEEDS, values, strict=True)
    ]


def null_claims(rng: np.random.Generator, studies: int) -> dict[str, float]:
    """Return the shares of studies with a verdict on any of three null claims."""
    claims = [ClaimConfig(f"c{n}", f"t{n}", "A", measure="log_pz") for n in range(3)]
    old = new = 0
    for _ in range(studies):
        changes = {claim.treatment: rng.normal(0, 0.01, len(SEEDS)) for claim in claims}
        found = judge(make_study(*claims), make_cells(changes, "log_pz"))
        new += any(one["verdict"] in VERDICTS for one in found)
        for one in found:
            assert one["verdict"] not in VERDICTS or not one["effect"]["low"] <= 0 <= one["effect"]["high"]
        effects = [mean_effect(values) for values in changes.values()]
        sides = [one.p_greater(0) for one in effects], [one.p_less(0) for one in effects]
        old += any(min(holm(side)) < 0.05 for side in sides)
    return {"one-sided .05": old / studies, "one-sided .025": new / studies}


def supported_with_zero(rng: np.random.Generator, studies: int) -> dict[str, float]:
    """Return the shares of *supported* whose 95 % interval includes zero; the effect is one standard deviation."""
    counts = {0.05: [0, 0], 0.025: [0, 0]}
    for _ in range(studies):
        effect = mean_effect(rng.normal(0.01, 0.01, len(SEEDS)))
        for level, count in counts.items():
            if effect.p_greater(0) < level:
                count[0] += 1
                count[1] += effect.bounds()[0] <= 0
    return {f"one-sided {level:g}": with_zero / supported for level, (supported, with_zero) in counts.items()}


def preserved_capability(rng: np.random.Generator, studies: int, real_text: float) -> dict[str, float]:
    """Return the shares of *supported* for an unchanged student, with a margin of one point.

    Real text raises the accuracy by `real_text`, shuffled text lowers it by 5 points. The first version needed both.
    """
    old = new = 0
    for _ in range(studies):
        means = {OWN: 0.0, "real": real_text, "shuffled": -0.05}
        changes = {treatment: rng.normal(mean, 0.005, len(SEEDS)) for treatment, mean in means.items()}
        (found,) = judge(make_study(KEEPS), make_cells(changes, "accuracy"))
        new += found["verdict"] == "supported"
        own, real, shuffled = (mean_effect(values) for values in changes.values())
        old += max(real.p_greater(0), shuffled.p_less(0), own.p_greater(-0.01)) < 0.05
    return {"both controls": old / studies, "a control that lowers": new / studies}


def growing_studies(rng: np.random.Generator, studies: int) -> dict[str, float]:
    """Return the shares of null studies that are supported at some number of seeds."""
    counts = {f"5 to {most} seeds": 0 for most in (10, 15, 20)} | {"declared seeds": 0}
    for _ in range(studies):
        values = rng.normal(0, 0.01, 20)
        p_values = [mean_effect(values[:seeds]).p_greater(0) for seeds in range(5, 21)]
        for most in (10, 15, 20):
            counts[f"5 to {most} seeds"] += min(p_values[: most - 4]) < 0.05
        counts["declared seeds"] += p_values[0] < 0.025
    return {name: count / studies for name, count in counts.items()}


def test_null_claims_get_a_verdict_at_the_nominal_rate() -> None:
    """The familywise error of any verdict on three claims is at most .06."""
    found = null_claims(np.random.default_rng(0), 2000)
    assert 0.03 <= found["one-sided .025"] <= 0.06
    assert found["one-sided .05"] > 0.07


def test_no_supported_claim_has_an_interval_with_zero() -> None:
    found = supported_with_zero(np.random.default_rng(1), 1000)
    assert found["one-sided 0.025"] == 0
    assert found["one-sided 0.05"] > 0.2


@pytest.mark.parametrize("real_text", [0.0, 0.005])
def test_a_finished_model_can_be_shown_to_keep_its_capability(real_text: float) -> None:
    found = preserved_capability(np.random.default_rng(2), 300, real_text)
    assert found["a control that lowers"] > 0.85
    assert found["both controls"] < 0.7


def test_added_seeds_make_false_support() -> None:
    found = growing_studies(np.random.default_rng(3), 1000)
    assert found["declared seeds"] <= 0.025 + 2.6 * np.sqrt(0.025 * 0.975 / 1000)
    assert found["5 to 20 seeds"] > 0.12


if __name__ == "__main__":
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 3_000
    for simulate in (null_claims, supported_with_zero, growing_studies):
        print(simulate.__name__, simulate(np.random.default_rng(0), size))
    for level in (0.0, 0.002, 0.005, 0.01):
        print("preserved_capability", level, preserved_capability(np.random.default_rng(0), size // 2, level))
