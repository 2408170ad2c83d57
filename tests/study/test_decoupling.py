"""Damaged students are not called decoupled; students that forget and keep their capability are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from jax_selftrain.study.memorization_contrasts import judge_decoupling, match_damage

SEEDS = range(100, 105)
NOISE = {"noise ×1": 0.01, "noise ×2": 0.04, "noise ×5": 0.25}
"""Damage, which grows with the square of the scale."""
SEQUENCES = 600
TASKS = [{"n": 2000, "chance": 0.0, "not_eligible": None}]


@dataclass
class Simulation:
    """Cells, changes of items and classes of a study with one student."""

    rng: np.random.Generator
    cells: list[dict[str, Any]] = field(default_factory=list)
    items: dict[tuple[str, str, int], dict[str, dict[str, np.ndarray]]] = field(default_factory=dict)
    classes: dict[tuple[str, str, int], np.ndarray] = field(default_factory=dict)

    def add(self, treatment: str, seed: int, damage: float, forgets: float = 0.0, accuracy: float = 0.0) -> None:
        """Add a student: damage breaks any sequence, forgetting a share of the held-out ones."""
        key = ("a", treatment, seed)
        probability = np.random.default_rng(7).uniform(0.2, 1.0, SEQUENCES)  # of the base
        known = probability > 0.5
        after = probability * np.exp(-6 * damage * self.rng.exponential(1, SEQUENCES))
        if treatment not in NOISE:
            self.classes[key] = np.where(self.rng.random(SEQUENCES) < 0.6, "held_out", "seen")
            after *= np.where((self.classes[key] == "held_out") & (self.rng.random(SEQUENCES) < forgets), 0.1, 1.0)
        self.items[key] = {
            "exact_match": {"sequences": (after > 0.5).astype(float) - known},
            "pz": {"sequences": after - probability},
            "accuracy": {"task": accuracy + self.rng.choice((-1.0, 0.0, 1.0), 2000, p=(0.02, 0.96, 0.02))},
        }
        change = {"accuracy": float(self.items[key]["accuracy"]["task"].mean()), "text/stories": damage}
        change |= {name: float(self.items[key][name]["sequences"].mean()) for name in ("exact_match", "pz")}
        measures = {name: {"change": {"value": value, "n": SEQUENCES}} for name, value in change.items()}
        cell = {"student": "a", "treatment": treatment, "seed": seed, "tasks": TASKS, "measures": measures}
        self.cells.append(cell)

    def judge(self, damage_text: str = "stories") -> dict[str, Any]:
        (found,) = judge_decoupling(self.cells, list(NOISE), {"a": damage_text}, self.items, self.classes)
        return found


def simulate(seed: int, damage: float, **student: float) -> Simulation:
    study = Simulation(np.random.default_rng(seed))
    for number in SEEDS:
        for name, level in NOISE.items():
            study.add(name, number, level * study.rng.uniform(0.95, 1.05))
        study.add("source a", number, damage * study.rng.uniform(0.95, 1.05), **student)
    return study


@pytest.mark.parametrize("damage", [0.01, 0.02, 0.04, 0.045])
def test_a_damaged_student_is_not_called_decoupled(damage: float) -> None:
    """Matched (0.01, 0.04 and 0.045) or interpolated; the three tests of extraction are not independent."""
    verdicts = [simulate(seed, damage).judge()["verdict"] for seed in range(60)]
    assert set(verdicts) <= {"not shown", "decoupled"}
    assert verdicts.count("decoupled") <= 3


def test_a_student_that_forgets_and_keeps_its_capability_is_called_decoupled() -> None:
    verdicts = [simulate(seed, 0.04, forgets=0.3).judge()["verdict"] for seed in range(30)]
    assert verdicts.count("decoupled") >= 28


def test_without_capability_it_is_not_decoupled() -> None:
    found = simulate(1, 0.04, forgets=0.3, accuracy=-0.05).judge()
    assert found["verdict"] == "not shown"
    assert found["reason"] == "capability is not shown to be preserved within 1 point."


def test_a_control_with_other_damage_tests_nothing() -> None:
    """The first version took any control with more damage, here five times as much, and called this *not shown*."""
    found = simulate(2, 0.07, forgets=0.3).judge()
    assert found["verdict"] == "not tested"
    assert found["reason"] == "the student of seed 100 has no control of equal damage."
    assert simulate(2, 0.02, forgets=0.3).judge()["controls"] == ["noise ×1", "noise ×2"]  # interpolated
    assert simulate(2, 0.045, forgets=0.3).judge()["controls"] == ["noise ×2"]


def test_damage_is_matched_within_the_caliper_or_interpolated() -> None:
    one, two, three = (("a", name, 1) for name in NOISE)
    assert match_damage(0.045, {one: 0.01, two: 0.04}) == pytest.approx({two: 1.125})
    assert match_damage(0.02, {one: 0.01, two: 0.04}) == pytest.approx({one: 2 / 3, two: 1 / 3})
    assert match_damage(0.07, {one: 0.01, two: 0.04, three: 0.25}) == {}  # 0.04 to 0.25 is too far
    assert match_damage(0.06, {one: -0.01, two: 0.04}) == {}
    assert match_damage(-0.01, {one: 0.01}) == {}


def test_an_equal_loss_of_seen_sequences_is_not_needed() -> None:
    """Held-out and seen average to no difference; only held-out sequences count."""
    study = simulate(3, 0.04, forgets=0.3)
    for key, changes in study.items.items():
        if key[1] == "source a":
            seen = study.classes[key] == "seen"
            for name in ("exact_match", "pz"):
                changes[name]["sequences"][seen] += 0.5
    assert study.judge()["verdict"] == "decoupled"


def test_a_verdict_needs_five_seeds_a_corpus_and_a_named_text() -> None:
    study = simulate(4, 0.04, forgets=0.3)
    assert study.judge("")["reason"] == "the text that measures damage is not known: set `damage_text`."
    study.cells = [cell for cell in study.cells if cell["seed"] < 104]
    found = study.judge()
    assert (found["verdict"], found["reason"]) == ("not tested", "4 seeds; a verdict needs 5.")
    assert found["exact_match"]["value"] < 0
    study.classes = {}
    assert study.judge()["reason"] == "it has no corpus, so no sequence is held out."
