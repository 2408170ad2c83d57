"""Matched controls separate simulated forgetting from damage."""

from __future__ import annotations

import numpy as np
import pytest

from jax_selftrain.study.memorization_contrasts import MIN_SEQUENCES, compare_with_matched, find_loops

N = 4000


def student(rng: np.random.Generator, logprob: np.ndarray, damage: float, forgotten: float) -> dict[str, np.ndarray]:
    """Simulate damage, which breaks improbable sequences first, and forgetting."""
    kept = rng.random(N) < np.exp(-damage * (0.2 - logprob)) * (1 - forgotten)
    return {"exact_match": kept, "logprob": logprob - damage - forgotten + 0.1 * rng.normal(size=N)}


def sides(forgotten: float, damage: float = 0.3) -> tuple:
    """Simulate sequences that are more probable than continuations."""
    rng = np.random.default_rng(7)
    pairs = []
    for scale, gone in ((0.5, forgotten), (2.0, 0.0)):
        logprob = -rng.exponential(scale, N)
        before = {"exact_match": rng.random(N) < 0.9, "logprob": logprob}
        pairs.append((before, student(rng, logprob, damage, gone)))
    return tuple(pairs)


def test_damage_alone_affects_sequences_and_matched_controls_equally():
    memory, unseen = sides(forgotten=0.0)
    found = compare_with_matched(memory, unseen)
    assert found["exact_match"]["difference"] == pytest.approx(0.0, abs=0.03)
    assert found["log_pz"]["difference"] == pytest.approx(0.0, abs=0.01)
    naive = memory[1]["exact_match"][memory[0]["exact_match"]].mean() - unseen[1]["exact_match"].mean()
    assert naive > 0.15  # without matching, memory would look stronger than it is
    assert found["n"] + found["unmatched"] == memory[0]["exact_match"].sum()


def test_forgetting_exceeds_the_loss_of_matched_controls():
    found = compare_with_matched(*sides(forgotten=0.25))
    kept = found["exact_match"]
    assert kept["sequences"] / kept["controls"] == pytest.approx(0.75, abs=0.04)
    assert found["log_pz"]["difference"] == pytest.approx(-0.25, abs=0.01)


def test_sequences_without_a_match_are_counted_and_few_matches_give_no_result():
    memory, unseen = sides(forgotten=0.0)
    followed = memory[0]["exact_match"].sum()
    apart = tuple({**side, "logprob": side["logprob"] - 1.0} for side in unseen)
    found = compare_with_matched(memory, apart)
    assert found["unmatched"] > found["n"] > MIN_SEQUENCES
    assert found["exact_match"] is not None
    far = compare_with_matched(memory, tuple({**side, "logprob": side["logprob"] - 99.0} for side in unseen))
    one = compare_with_matched(memory, tuple({name: values[:1] for name, values in side.items()} for side in unseen))
    for nothing in (far, one):
        assert (nothing["n"], nothing["unmatched"]) == (0, followed)
        assert nothing["exact_match"] is nothing["log_pz"] is None
    few = tuple({name: values[: MIN_SEQUENCES - 1] for name, values in side.items()} for side in memory)
    assert compare_with_matched(few, unseen)["exact_match"] is None


def test_continuations_that_loop_are_found() -> None:
    """The second half of 16 tokens repeats one to four tokens."""
    text = np.arange(16)
    rows = [text, np.where(text < 8, text, 7), np.where(text < 7, text, text % 2), np.where(text < 8, text, text % 4)]
    rows += [np.where(text < 8, text, text % 5), np.where(text < 10, text, 3), np.zeros(16, int)]
    assert find_loops(np.array(rows)).tolist() == [False, True, True, True, False, False, True]
    assert find_loops(np.array(rows)[:, :3]).tolist() == [False] * 7
