"""Intervals and tests against scipy, closed forms, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from jax_selftrain.stats import estimators
from jax_selftrain.stats.estimators import (
    Estimate,
    exp_and_stderr,
    mean_and_stderr,
    ratio_and_stderr,
    wilson_interval,
)
from jax_selftrain.study.paired_results import clustered_proportion


def macro_change(groups, scales=None) -> Estimate:
    effects = [estimators.paired_proportion_effect(before, after) for before, after in groups]
    return estimators.macro_effect(effects, scales).estimate()


def test_mean_has_scipys_t_interval() -> None:
    values = np.random.default_rng(0).normal(3, 2, 40)
    found = estimators.mean(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.value, found.n) == (pytest.approx(values.mean()), 40)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_share_has_scipys_wilson_interval() -> None:
    found = estimators.proportion([True] * 7 + [False] * 13)
    expected = stats.binomtest(7, 20).proportion_ci(method="wilson")
    assert (found.value, found.low, found.high, found.n) == (0.35, expected.low, expected.high, 20)


def test_ratio_is_the_mean_where_all_denominators_are_equal() -> None:
    values = np.random.default_rng(1).gamma(2.0, size=30)
    found, expected = estimators.ratio_of_sums(values * 5, np.full(30, 5)), estimators.mean(values)
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))


def test_ratio_of_unequal_documents_covers_the_truth() -> None:
    # 1,000 simulated text files of 60 documents: the standard error of a coverage of .95 is .007.
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(1000):
        tokens = rng.integers(20, 200, 60)
        difficulty = rng.normal(1.3, 0.2, 60)  # of a document; the truth is its mean, as lengths do not depend on it
        estimate = estimators.ratio_of_sums(difficulty * tokens, tokens)
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= 1.3 <= estimate.high
    assert 0.93 <= covered / 1000 <= 0.97  # three standard errors


def test_paired_change_ignores_what_pairs_share() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(0, 100, 50)
    change = estimators.mean((base + rng.normal(1, 0.1, 50)) - base)
    assert change.low is not None
    assert change.high is not None
    assert change.high - change.low < 0.1
    assert change.value == pytest.approx(1, abs=0.1)


def test_share_change_matches_bonett_and_price_by_hand() -> None:
    before = np.array([1] * 40 + [0] * 10 + [1] * 4 + [0] * 6, bool)
    after = np.array([1] * 40 + [0] * 10 + [0] * 4 + [1] * 6, bool)
    found = estimators.paired_proportion_effect(before, after).estimate()
    gained, lost = 7 / 62, 5 / 62
    half = stats.norm.ppf(0.975) * np.sqrt((gained + lost - (gained - lost) ** 2) / 62)
    assert (found.value, found.n) == (2 / 60, 60)
    assert (found.low, found.high) == pytest.approx((gained - lost - half, gained - lost + half))


@pytest.mark.parametrize(("p_before", "p_after", "n"), [(0.6, 0.65, 100), (0.02, 0.0, 60), (0.9, 0.85, 300)])
def test_share_change_covers_the_truth(p_before: float, p_after: float, n: int) -> None:
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(1000):
        before, after = rng.random(n) < p_before, rng.random(n) < p_after
        found = estimators.paired_proportion_effect(before, after).estimate()
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= p_after - p_before <= found.high
    # At least .95 but for three standard errors of the simulation; for rare outcomes this interval is conservative.
    assert covered / 1000 >= 0.93


def test_no_flip_at_all_is_not_called_certain() -> None:
    same = np.zeros(96, bool)
    found = estimators.paired_proportion_effect(same, same).estimate()
    assert found.value == 0.0
    assert found.low is not None
    assert found.high is not None
    assert found.low < -0.01 < 0.01 < found.high


def test_flips_add_up_and_mcnemar_is_exact() -> None:
    rng = np.random.default_rng(5)
    before, after = rng.random(200) < 0.5, rng.random(200) < 0.6
    moved = estimators.mcnemar_table(before, after)
    assert moved.kept + moved.lost + moved.gained + moved.both_wrong == moved.n == 200
    assert moved.kept + moved.lost == before.sum()
    assert moved.kept + moved.gained == after.sum()
    discordant = moved.lost + moved.gained
    tail = stats.binom.cdf(min(moved.lost, moved.gained), discordant, 0.5)
    assert moved.mcnemar_p == pytest.approx(min(1.0, 2 * tail))


def test_a_checkpoint_compared_with_itself_differs_by_exactly_nothing() -> None:
    rng = np.random.default_rng(6)
    answers, losses, tokens = rng.random(50) < 0.5, rng.gamma(2.0, size=50), rng.integers(1, 9, 50)
    assert estimators.mean(losses - losses) == Estimate(0.0, 0.0, 0.0, 50)
    assert estimators.ratio_of_sums(losses - losses, tokens) == Estimate(0.0, 0.0, 0.0, 50)
    assert estimators.paired_proportion_effect(answers, answers).estimate().value == 0.0
    assert macro_change([(answers, answers), (~answers, ~answers)]).value == 0.0
    assert estimators.mcnemar_table(answers, answers).mcnemar_p == 1.0


def test_macro_weighs_groups_equally() -> None:
    small, large = [True, False], [True] * 30 + [False] * 10
    assert estimators.macro_mean([small, large]).value == pytest.approx((0.5 + 0.75) / 2)
    change = macro_change([(small, [True, True]), (large, large)])
    assert (change.value, change.n) == (0.25, 42)
    scaled = macro_change([(small, [True, True]), (large, large)], scales=[2.0, 1.0])
    assert scaled.value == 0.5


def test_one_group_is_its_own_macro() -> None:
    rng = np.random.default_rng(7)
    before, after = rng.random(80) < 0.5, rng.random(80) < 0.5
    assert macro_change([(before, after)]) == estimators.paired_proportion_effect(before, after).estimate()
    mean, macro = estimators.mean(before), estimators.macro_mean([before])
    assert (macro.value, macro.low, macro.high) == pytest.approx((mean.value, mean.low, mean.high))


def test_intervals_end_at_what_is_possible() -> None:
    """Of few items, t and Bonett and Price's intervals are wider than the range."""
    lost = estimators.paired_proportion_effect([True], [False])
    assert lost.stderr * 1.96 > lost.adjusted_value + 1
    assert lost.estimate() == estimators.Estimate(
        -1.0, -1.0, pytest.approx(-1 / 3 + 1.959964 * math.sqrt((1 - 1 / 9) / 3), abs=1e-6), 1
    )
    assert macro_change([([True], [False]), ([True] * 2, [True] * 2)], [2.0, 4.0]).low >= -3.0
    right = [np.array([True, False, True]), np.array([True, True])]
    assert estimators.macro_mean(right).high > 1
    assert estimators.macro_mean(right, [(0.0, 1.0)] * 2).high == 1
    mixed = clustered_proportion(np.array([True, True, False]), np.array([0, 0, 1]))
    assert (mixed.low, mixed.high, mixed.n) == (0.0, 1.0, 2)


def test_clusters_that_agree_have_a_width() -> None:
    """Five clusters of two items are as five items."""
    clusters = np.repeat(np.arange(5), 2)
    for outcome in (True, False):
        found = clustered_proportion(np.array([outcome] * 10), clusters)
        assert (found.low, found.high) == tuple(wilson_interval([outcome] * 5))
        assert found.n == 5
    rng = np.random.default_rng(0)
    labels, outcomes = rng.integers(0, 40, 400), rng.random(400) < 0.6
    found = clustered_proportion(outcomes, labels)
    sums = [estimators.sum_by_cluster(one, labels) for one in (outcomes, np.ones(400))]
    assert found == estimators.ratio_of_sums(*sums)  # far from 0 and 1, and with both outcomes


def test_one_value_has_no_interval() -> None:
    assert estimators.mean([3.0]) == Estimate(3.0, None, None, 1)
    assert estimators.ratio_of_sums([3.0], [2.0]) == Estimate(1.5, None, None, 1)


@pytest.mark.parametrize(
    "call", [lambda: estimators.mean([]), lambda: estimators.proportion([]), lambda: estimators.macro_mean([])]
)
def test_nothing_has_no_mean(call) -> None:
    with pytest.raises(ValueError, match="undefined"):
        call()


def test_unlike_items_and_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="same items"):
        estimators.mcnemar_table([True], [True, False])
    with pytest.raises(ValueError, match="finite"):
        estimators.mean([1.0, float("nan")])


def test_the_error_of_a_share_has_n_minus_one():
    mean, stderr = mean_and_stderr([True, True, True, False])
    assert mean == 0.75
    assert stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3), rel=1e-12)
    assert mean_and_stderr([1.0]) == (1.0, None)


def test_the_error_of_a_ratio_is_the_spread_over_new_documents():
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 300, (4000, 200))
    # Longer texts are easier here, and tokens of a text share a level: ignoring either would misstate the error.
    nll = lengths * (1.5 - lengths / 1000 + 0.2 * rng.standard_normal(lengths.shape))
    ratios, errors = np.array([ratio_and_stderr(y, x) for y, x in zip(nll, lengths, strict=True)], float).T
    # 4000 replications know the spread to 1.1 % (one standard error); the estimator's own bias at n = 200 is below 1 %.
    assert errors.mean() == pytest.approx(ratios.std(), rel=0.04)


def test_ratio_of_sums_not_mean_of_ratios():
    ratio, stderr = ratio_and_stderr([1.0, 9.0], [1.0, 3.0])
    assert ratio == 2.5
    assert stderr == pytest.approx(math.sqrt(2 * (1.5**2 + 1.5**2)) / 4)
    assert ratio_and_stderr([2.0], [4.0]) == (0.5, None)


def test_exp_carries_the_error_over():
    assert exp_and_stderr(math.log(3.0), 0.1) == pytest.approx((3.0, 0.3))
    assert exp_and_stderr(0.0, None) == (1.0, None)
    assert exp_and_stderr(1e4, 0.1) == (None, None)  # a text without white space is one word of 10,000 nats
    assert exp_and_stderr(709.0, 1e9) == (pytest.approx(math.exp(709)), None)


def test_wilson_stays_inside_and_has_width_at_the_ends():
    low, high = wilson_interval([False] * 50)
    assert (low, high) == pytest.approx((0.0, 1.959964**2 / (50 + 1.959964**2)), abs=1e-6)
    assert wilson_interval([True] * 50) == pytest.approx([1 - high, 1.0], abs=1e-12)
