"""Damaged students are not called decoupled; forgetful students are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jax_selftrain.study.memorization_contrasts import judge_decoupling

SEEDS = range(100, 105)
CONTROLS = ("noise ×1", "noise ×3", "noise ×9")
BASE = {"text/stories": 0.9, "exact_match": 0.6, "pz": 0.5}


def simulate_noise(rng: np.random.Generator, loss: float, forgets: float = 0.0) -> dict[str, float]:
    """Simulate weight noise: exact match falls steeply with the loss."""
    extra = loss - BASE["text/stories"]
    exact = BASE["exact_match"] * np.exp(-extra / 0.05) - forgets + 0.01 * rng.normal()
    probability = BASE["pz"] - 2 * extra - 0.7 * forgets + 0.01 * rng.normal()
    return {"text/stories": loss, "exact_match": float(exact), "pz": float(probability)}


def cell(treatment: str, seed: int, after: dict[str, float]) -> dict[str, Any]:
    measures = {
        name: {"before": {"value": BASE[name]}, "after": {"value": v}, "change": {"value": v - BASE[name]}}
        for name, v in after.items()
    }
    return {"student": "a", "treatment": treatment, "seed": seed, "measures": measures}


def simulate_study(rng: np.random.Generator, forgets: float, own: float = 0.93) -> list[dict[str, Any]]:
    cells = []
    for seed in SEEDS:
        for name, loss in zip(CONTROLS, (0.91, 0.94, 1.1), strict=True):
            cells.append(cell(name, seed, simulate_noise(rng, loss + 0.002 * rng.normal())))
        cells.append(cell("source a", seed, simulate_noise(rng, own + 0.002 * rng.normal(), forgets)))
    return cells


def verdict(cells: list[dict[str, Any]]) -> str:
    (found,) = judge_decoupling(cells, CONTROLS)
    return str(found["verdict"])


@pytest.mark.parametrize("own", [0.905, 0.91, 0.925, 0.94, 1.0])
def test_a_noise_only_student_is_not_called_decoupled_at_any_damage(own: float) -> None:
    rng = np.random.default_rng(0)
    verdicts = [verdict(simulate_study(rng, 0.0, own)) for _ in range(200)]
    assert verdicts.count("decoupled") <= 4  # each of the three tests alone would allow ten


def test_a_student_that_forgets_is_called_decoupled() -> None:
    rng = np.random.default_rng(1)
    assert [verdict(simulate_study(rng, 0.2)) for _ in range(50)].count("decoupled") >= 48


def test_without_falling_probability_it_is_not_decoupled() -> None:
    rng, cells = np.random.default_rng(2), []
    for one in simulate_study(rng, 0.2):
        if one["treatment"] == "source a":
            level = 0.55 + 0.01 * rng.normal()
            one["measures"]["pz"] |= {"after": {"value": level}, "change": {"value": level - BASE["pz"]}}
        cells.append(one)
    (found,) = judge_decoupling(cells, CONTROLS)
    assert found["verdict"] == "not shown"
    assert "mean p_z has not fallen" in found["reason"]


def test_a_verdict_needs_five_seeds_and_a_control_with_enough_damage() -> None:
    rng = np.random.default_rng(3)
    cells = simulate_study(rng, 0.2)
    (found,) = judge_decoupling([one for one in cells if one["seed"] < 104], CONTROLS)
    assert (found["verdict"], found["reason"]) == ("not tested", "4 seeds; a verdict needs 5.")
    assert found["exact_match"]["value"] < 0
    (found,) = judge_decoupling(simulate_study(rng, 0.0, own=1.5), CONTROLS)
    assert (found["verdict"], found["reason"]) == (
        "not tested",
        "no control is as damaged as the student of seed 100.",
    )
    (found,) = judge_decoupling(cells, ())[:1]
    assert found["verdict"] == "not tested"


def test_the_control_is_the_least_damaged_one_above_the_student() -> None:
    (found,) = judge_decoupling(simulate_study(np.random.default_rng(4), 0.0), CONTROLS)
    assert found["controls"] == ["noise ×3"]


def test_damage_is_measured_on_the_text_that_the_base_predicts_best() -> None:
    """The other text becomes easier and does not measure damage."""
    cells = simulate_study(np.random.default_rng(5), 0.0)
    for one in cells:
        level = 1.0 if one["treatment"] == "source a" else 2.0
        foreign = {"before": {"value": 2.0}, "after": {"value": level}, "change": {"value": level - 2.0}}
        one["measures"] = {"text/foreign": foreign, **one["measures"]}
    (found,) = judge_decoupling(cells, CONTROLS)
    assert found["controls"] == ["noise ×3"]
