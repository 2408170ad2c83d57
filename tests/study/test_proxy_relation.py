"""Relations of proxies in simulated studies with known truth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from jax_selftrain.study.proxy_relations import (
    SOURCES_FOR_ABSENCE,
    _interval,
    _permutation_test,
    _selection_regret,
    judge_relations,
    reliability,
)


def matrix(rng: np.random.Generator, students: int, sources: int, link: float) -> tuple[np.ndarray, np.ndarray]:
    """Simulate proxies and gains related by `link`, with source and student effects."""
    shared = rng.normal(size=sources)
    proxy = shared + rng.normal(size=(students, 1)) + 0.5 * rng.normal(size=(students, sources))
    gain = rng.normal(size=sources) + rng.normal(size=(students, 1)) + 0.5 * rng.normal(size=(students, sources))
    return proxy, gain + link * shared


def naive_p(proxy: np.ndarray, gain: np.ndarray) -> float:
    """A test over cells as if they were independent draws."""
    centered = (values - values.mean(axis=1, keepdims=True) for values in (proxy, gain))
    return float(stats.spearmanr(*(values.ravel() for values in centered)).pvalue)


def test_unrelated_proxies_are_called_related_at_the_nominal_rate() -> None:
    rng, hits, naive, runs = np.random.default_rng(0), 0, 0, 300
    for _ in range(runs):
        proxy, gain = matrix(rng, 3, 6, 0.0)
        hits += _permutation_test(proxy, gain)[1] <= 0.05
        naive += naive_p(proxy, gain) <= 0.05
    assert hits / runs < 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / runs)
    assert naive / runs > 0.15  # the test that forgets who shares what


def test_a_strong_relation_is_found() -> None:
    rng = np.random.default_rng(1)
    found = [
        judge_relations({"good": proxy}, gain[None], rng.normal(size=8))[0]
        for proxy, gain in (matrix(rng, 4, 8, 3.0) for _ in range(20))
    ]
    assert sum(one["verdict"] == "related" for one in found) >= 16
    assert np.mean([one["regret"] for one in found]) < 0.5 * np.mean([one["random_regret"] for one in found])


def test_a_proxy_that_only_follows_the_size_of_the_source_is_not_called_related() -> None:
    rng, verdicts = np.random.default_rng(2), []
    for _ in range(40):
        size = np.arange(8.0)
        proxy = size + 0.8 * rng.normal(size=(4, 8))
        gain = size + 0.8 * rng.normal(size=(4, 8))
        found = judge_relations({"size in disguise": proxy}, gain[None], size)[0]
        assert found["p"] <= 0.05
        without_ability = judge_relations({"size in disguise": proxy}, gain[None])[0]
        assert without_ability["verdict"] == "related"  # the strength of the sources is not given
        verdicts.append(found["verdict"])
    assert verdicts.count("related") <= 5


def own_text_matrix(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Simulate unrelated proxies, source effects, and own text that is special for both."""
    own = np.eye(3, 6, dtype=bool)
    proxy, gain = matrix(rng, 3, 6, 0.0)
    return proxy + 8.0 * own, gain + 8.0 * own, own


def test_a_proxy_that_only_knows_the_own_text_is_not_called_related() -> None:
    rng, verdicts, naive, p_values = np.random.default_rng(7), [], 0, []
    for _ in range(150):
        proxy, gain, own = own_text_matrix(rng)
        (found,) = judge_relations({"own": proxy}, gain[None], self_mask=own)
        verdicts.append(found["verdict"])
        naive += judge_relations({"own": proxy}, gain[None])[0]["verdict"] == "related"
        p_values.append(found["p_without_own"])
    assert verdicts.count("related") / 150 <= 0.05
    assert naive / 150 > 0.2
    assert np.mean(np.array(p_values) <= 0.05) < 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / 150)


def test_a_relation_in_the_other_direction_is_not_called_related() -> None:
    proxy, gain = matrix(np.random.default_rng(8), 4, 8, 5.0)
    (found,) = judge_relations({"reversed": -proxy}, gain[None])
    assert found["p"] <= 0.05
    assert (found["verdict"], found["reason"]) == ("cannot tell", "it correlates negatively with the gain.")


def test_absence_needs_many_sources() -> None:
    assert _interval(0.0, SOURCES_FOR_ABSENCE)[1] < 0.3 < _interval(0.0, SOURCES_FOR_ABSENCE - 1)[1]
    rng = np.random.default_rng(3)
    few = [
        judge_relations({"none": proxy}, gain[None])[0]["verdict"]
        for proxy, gain in (matrix(rng, 3, 6, 0) for _ in range(20))
    ]
    assert "unrelated" not in few
    many = []
    for _ in range(20):
        proxy, gain = matrix(rng, 2, 90, 0.0)
        many.append(judge_relations({"none": proxy}, gain[None])[0]["verdict"])
    assert many.count("unrelated") >= 14
    assert many.count("related") <= 3


def test_the_correlation_is_of_ranks_within_students() -> None:
    rng = np.random.default_rng(4)
    proxy, gain = rng.normal(size=(1, 7)), rng.normal(size=(1, 7))
    r, p = _permutation_test(proxy, gain)
    reference = stats.spearmanr(proxy[0], gain[0]).statistic
    assert r == pytest.approx(reference)
    values = [
        abs(stats.spearmanr(proxy[0], gain[0][list(order)]).statistic) for order in itertools.permutations(range(7))
    ]
    assert p == pytest.approx(np.mean(np.array(values) >= abs(reference) - 1e-9))


def test_student_levels_do_not_matter_and_missing_cells_are_ignored() -> None:
    rng = np.random.default_rng(5)
    proxy, gain = matrix(rng, 3, 6, 1.0)
    assert _permutation_test(proxy, gain) == _permutation_test(
        proxy + np.array([[5], [-9], [0]]), gain * [[1], [4], [2]]
    )
    with_hole = proxy.copy()
    with_hole[0] = np.nan
    assert _permutation_test(with_hole, gain)[0] == pytest.approx(_permutation_test(proxy[1:], gain[1:])[0])
    assert _permutation_test(np.ones((3, 6)), gain) == (None, None)
    assert judge_relations({"two sources": proxy[:, :2]}, gain[None, :, :2])[0]["verdict"] == "cannot tell"


def test_reliability_is_of_the_mean_over_seeds() -> None:
    rng = np.random.default_rng(6)
    true = rng.normal(size=(3, 200))
    noisy = [true + rng.normal(size=(4, 3, 200)) for _ in range(2)]
    expected = np.corrcoef(*((one.mean(0) - one.mean((0, 2))[:, None]).ravel() for one in noisy))[0, 1]
    assert reliability(noisy[0]) == pytest.approx(expected, abs=0.05)
    assert reliability(noisy[0][:1]) is None


def test_a_proxy_that_says_nothing_chooses_at_random() -> None:
    """The order of the sources does not matter."""
    gains = np.array([[9.0, 1.0, 2.0, 3.0]])
    assert _selection_regret(np.ones((1, 4)), gains) == (5.25, 5.25)
    assert _selection_regret(np.array([[2.0, 2.0, 1.0, 0.0]]), gains) == (4.0, 5.25)


def test_a_verdict_names_the_checks_that_were_made() -> None:
    gains = np.tile(np.arange(8.0), (2, 3, 1))
    (found,) = judge_relations({"x": np.tile(np.arange(8.0), (3, 1))}, gains)
    assert found["reason"] == "it correlates with the gain."
    assert (found["partial"], found["p_partial"]) == (None, None)
    (found,) = judge_relations({"x": np.tile(np.arange(8.0), (3, 1))}, gains, self_mask=np.eye(3, 8, dtype=bool))
    assert found["reason"] == "it correlates with the gain, also without own texts."


def test_sources_without_data_do_not_narrow_an_interval() -> None:
    rng = np.random.default_rng(4)
    values, gains = rng.normal(size=(2, 40)), rng.normal(size=(1, 2, 40))
    values[:, 4:] = np.nan
    (found,) = judge_relations({"x": values}, gains)
    assert (found["cells"], found["sources"]) == (8, 4)
    assert found["verdict"] == "cannot tell"
    values[:, 2:] = np.nan
    assert judge_relations({"x": values}, gains)[0]["low"] is None
