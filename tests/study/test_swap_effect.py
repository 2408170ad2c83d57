"""The swap estimator recovers the effect of being seen without selection bias."""

from __future__ import annotations

import numpy as np
import pytest

from jax_selftrain.stats.estimators import Estimate
from jax_selftrain.study.memorization_contrasts import naive_difference, swap_effect


def simulate(
    rng: np.random.Generator, effect: float, seeds: int = 2, n: int = 1000
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Simulate memorized sequences that are emitted more often."""
    memorized = rng.beta(1, 2, n)
    outcomes, classes = [], []
    for _ in range(seeds):
        seen = rng.random(n) < 0.05 + 0.7 * memorized
        partial = ~seen & (rng.random(n) < 0.2)
        classes.append(np.where(seen, "seen", np.where(partial, "partial", "held_out")))
        student = 0.1 * rng.normal()  # some students are better than others at everything
        outcomes.append(rng.random(n) < np.clip(0.1 + 0.7 * memorized + student + effect * seen, 0, 1))
    return outcomes, classes


@pytest.mark.parametrize("effect", [0.0, 0.08])
@pytest.mark.parametrize("seeds", [2, 4])
def test_the_effect_is_recovered_and_its_interval_covers_it(effect: float, seeds: int) -> None:
    rng, estimates, covered, naive = np.random.default_rng(7), [], 0, []
    for _ in range(400):
        simulated = simulate(rng, effect, seeds)
        found = swap_effect(*simulated)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        estimates.append(found.value)
        covered += found.low <= effect <= found.high
        naive.append(naive_difference(*simulated))
    assert np.mean(estimates) == pytest.approx(effect, abs=0.008)  # clipped at 0 and 1 for the strongest students
    assert 0.92 <= covered / 400 <= 0.98
    assert np.mean(naive) > effect + 0.1  # the selection bias


def test_a_better_student_is_not_an_effect() -> None:
    classes = [np.array(["seen"] * 90 + ["held_out"] * 10), np.array(["held_out"] * 90 + ["seen"] * 10)]
    outcomes = [np.full(100, 0.9), np.full(100, 0.2)]
    found = swap_effect(outcomes, classes)
    assert found is not None
    assert found.value == pytest.approx(0.0)
    assert found.n == 100


def test_partial_overlap_is_ignored_and_both_directions_are_needed() -> None:
    partial = np.array(["partial", "seen", "held_out"])
    assert swap_effect([np.zeros(3), np.ones(3)], [partial, partial]) is None
    one_way = [np.array(["seen", "seen"]), np.array(["held_out", "seen"])]
    assert swap_effect([np.zeros(2), np.ones(2)], one_way) is None
    few = [np.array(["seen"] * 9 + ["held_out"] * 9), np.array(["held_out"] * 9 + ["seen"] * 9)]
    assert swap_effect([np.arange(18.0), np.zeros(18)], few) == Estimate(-4.5, None, None, 18)
    assert naive_difference([np.array([1.0, 0.0])], [np.array(["seen", "held_out"])]) == 1.0
    assert naive_difference([np.zeros(3)], [np.array(["seen"] * 3)]) is None
