"""Non-inferiority tests against libraries, published figures, enumeration and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from jax_selftrain.io.rng import make_rng
from jax_selftrain.stats import estimators
from jax_selftrain.stats.estimators import Effect, Estimate
from jax_selftrain.stats.noninferiority import (
    NoninferiorityResult,
    benjamini_hochberg,
    evidence_level,
    holm,
    noninferiority_test,
    score_confidence_limit,
    score_test_p,
)

P_VALUES = [
    np.random.default_rng(0).beta(0.4, 2, 30).tolist(),
    [0.04, 0.01, 0.01, 0.03, 1.0, 0.01],  # ties
    [0.7],
]


def binomial_band(rate: float, trials: int) -> float:
    """Return three standard errors of a simulated rate."""
    return 3 * math.sqrt(rate * (1 - rate) / trials)


def items(n: int, lost: int, gained: int) -> tuple[np.ndarray, np.ndarray]:
    """Return yes/no answers before and after with these flips."""
    before, after = np.zeros(n, bool), np.zeros(n, bool)
    before[:lost] = True
    after[lost : lost + gained] = True
    return before, after


def share_judgment(n: int, lost: int, gained: int, margin: float) -> NoninferiorityResult:
    return noninferiority_test(estimators.paired_proportion_effect(*items(n, lost, gained)), margin, (lost, gained))


# ------------------------------------------------------------------ McNemar


def test_mcnemar_equals_statsmodels() -> None:
    contingency = pytest.importorskip("statsmodels.stats.contingency_tables", reason="statsmodels is the reference")
    rng = np.random.default_rng(1)
    for n in (1, 7, 60, 800):
        before, after = rng.random(n) < 0.6, rng.random(n) < 0.5
        moved = estimators.mcnemar_table(before, after)
        table = [[moved.kept, moved.lost], [moved.gained, moved.both_wrong]]
        assert moved.mcnemar_p == pytest.approx(contingency.mcnemar(table, exact=True).pvalue, rel=1e-9)


def test_mid_p_counts_the_outcome_itself_by_half() -> None:
    for lost, gained in [(0, 0), (1, 7), (5, 5), (0, 3), (40, 61)]:
        n = lost + gained
        chances = stats.binom.pmf(np.arange(n + 1), n, 0.5)
        distance = np.abs(np.arange(n + 1) - n / 2)
        seen = abs(gained - n / 2)
        expected = chances[distance > seen].sum() + chances[distance == seen].sum() / 2 if n else 1.0
        assert estimators.mcnemar(lost, gained)[1] == pytest.approx(expected, rel=1e-9)
    # Fagerland, Lydersen and Laake 2013, airway hyper-responsiveness before and after transplantation (1 and 7 flips)
    assert estimators.mcnemar(1, 7) == (pytest.approx(0.0703, abs=5e-5), pytest.approx(0.0391, abs=5e-5))


def test_no_p_value_passes_one_by_rounding() -> None:
    for fewer in range(400):
        p, mid_p = estimators.mcnemar(fewer, fewer + 1)
        assert 0 < mid_p < p <= 1
        assert p == pytest.approx(1)
        assert holm([p, p]) == pytest.approx([1, 1])
        assert benjamini_hochberg([p, p]) == pytest.approx([1, 1])


def test_flipping_signs_of_single_items_is_mcnemars_test() -> None:
    for lost, gained in [(0, 0), (1, 7), (5, 5), (30, 44)]:
        p, mid_p = estimators.sign_flip_test([-1] * lost + [1] * gained + [0] * 9)
        assert (p, mid_p) == pytest.approx(estimators.mcnemar(lost, gained), rel=1e-9)


def test_flipping_signs_of_clusters_equals_all_sign_vectors() -> None:
    gains = np.array([3, -1, 2, 2, 0, -4, 1])
    signs = np.array(np.meshgrid(*[[-1, 1]] * gains.size)).reshape(gains.size, -1)
    sums, seen = np.abs(gains @ signs), abs(int(gains.sum()))
    p, mid_p = estimators.sign_flip_test(gains)
    assert p == pytest.approx(np.mean(sums >= seen))
    assert mid_p == pytest.approx(np.mean(sums > seen) + np.mean(sums == seen) / 2)


def test_mcnemar_keeps_its_level_and_mid_p_comes_close() -> None:
    # 2,000 pairs of models that differ by nothing: the rate's standard error is .0049 at .05
    rng = np.random.default_rng(2)
    trials, n = 2000, 400
    lost, gained = rng.multinomial(n, [0.06, 0.06, 0.88], trials).T[:2]
    p = np.array([estimators.mcnemar(b, c) for b, c in zip(lost.tolist(), gained.tolist(), strict=True)])
    exact, mid = (p < 0.05).mean(0)
    assert exact <= 0.05
    assert abs(mid - 0.05) <= binomial_band(0.05, trials)


def test_ignoring_clusters_calls_nothing_something_and_minding_them_does_not() -> None:
    # 100 entities of 8 questions each; what happens to an entity happens to most of its questions
    rng = np.random.default_rng(3)
    trials, wrong = 500, np.zeros(3)
    clusters = np.repeat(np.arange(100), 8)
    for _ in range(trials):
        moves = np.repeat(rng.choice([-1, 0, 1], 100, p=[0.1, 0.8, 0.1]), 8) * (rng.random(800) < 0.7)
        before, after = moves == -1, moves == 1
        low, high = estimators.paired_proportion_effect(before, after, clusters).bounds()
        wrong += [
            estimators.mcnemar_table(before, after).mcnemar_p < 0.05,
            estimators.sign_flip_test(estimators.sum_by_cluster(moves, clusters))[0] < 0.05,
            not low <= 0 <= high,
        ]
    naive, flipped, outside = wrong / trials
    assert naive > 0.2
    assert flipped <= 0.05 + binomial_band(0.05, trials)
    assert abs(outside - 0.05) <= binomial_band(0.05, trials) + 0.01  # Student's t of discrete counts: .04 to .06


# ------------------------------------------------------------------ multiplicity


@pytest.mark.parametrize("p_values", P_VALUES)
def test_holm_and_benjamini_hochberg_equal_statsmodels(p_values: list[float]) -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest", reason="statsmodels is the reference")
    assert holm(p_values) == pytest.approx(multitest.multipletests(p_values, method="holm")[1], rel=1e-12)
    assert benjamini_hochberg(p_values) == pytest.approx(multitest.multipletests(p_values, method="fdr_bh")[1])


def test_holm_by_hand_and_of_nothing() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert (holm([]), benjamini_hochberg([])) == ([], [])


def test_holm_errs_once_in_twenty_families() -> None:
    p_values = np.random.default_rng(4).random((2000, 6))
    rate = np.mean([min(holm(family)) < 0.05 for family in p_values.tolist()])
    assert rate <= 0.05 + binomial_band(0.05, 2000)
    assert np.mean(p_values.min(1) < 0.05) > 0.2  # uncorrected: 1 − .95⁶ = .26


# ------------------------------------------------------------------ intervals


def test_tangos_limits_equal_a_published_example() -> None:
    # Fagerland, Lydersen and Laake, Stat. Med. 33 (2014): Tango's 95 % interval, 1 and 7 flips of 21: (−.517, −.026)
    assert score_confidence_limit(7, 1, 21, 0.025) == pytest.approx(-0.517, abs=5e-4)
    assert -score_confidence_limit(1, 7, 21, 0.025) == pytest.approx(-0.026, abs=5e-4)


def test_the_score_test_at_zero_is_mcnemars_without_continuity_correction() -> None:
    for lost, gained in [(3, 9), (20, 11)]:
        expected = stats.norm.sf((gained - lost) / math.sqrt(gained + lost))
        assert score_test_p(lost, gained, 200, 0.0) == pytest.approx(expected)
    assert score_test_p(0, 0, 50, 0.0) == 0.5


@pytest.mark.parametrize(("lost", "gained", "n"), [(0, 0, 40), (5, 5, 5000), (0, 40, 40), (40, 0, 40), (1, 0, 1)])
def test_the_score_limit_is_where_its_p_value_is_five_percent(lost: int, gained: int, n: int) -> None:
    limit = score_confidence_limit(lost, gained, n)
    assert -1 <= limit <= (gained - lost) / n
    if limit > -1:
        assert score_test_p(lost, gained, n, limit) == pytest.approx(0.05, abs=1e-6)


def test_seeds_have_scipys_paired_t_test() -> None:
    rng = np.random.default_rng(5)
    base, student = rng.normal(0.6, 0.01, 5), rng.normal(0.59, 0.01, 5)
    effect = estimators.mean_effect(student - base)
    test = stats.ttest_rel(student, base)
    assert 2 * effect.p_less(0.0) == pytest.approx(test.pvalue)
    assert effect.bounds(0.9) == pytest.approx(tuple(test.confidence_interval(0.9)))
    assert noninferiority_test(effect, 0.02).p_preserved == pytest.approx(
        stats.ttest_1samp(student - base, -0.02, alternative="greater").pvalue
    )


def test_the_bootstrap_of_a_mean_is_scipys() -> None:
    values = np.random.default_rng(6).gamma(2.0, size=80)
    found = estimators.bootstrap(values, resamples=999, seed=7)
    expected = stats.bootstrap((values,), np.mean, n_resamples=999, rng=make_rng("bootstrap", 7)).confidence_interval
    assert (found.value, found.n) == (pytest.approx(values.mean()), 80)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_the_bootstrap_of_a_ratio_is_scipys_on_pairs() -> None:
    rng = np.random.default_rng(8)
    tokens = rng.integers(20, 200, 50)
    losses = tokens * rng.normal(1.3, 0.2, 50)
    found = estimators.bootstrap(losses, tokens, resamples=999, seed=1)
    expected = stats.bootstrap(
        (losses, tokens),
        lambda y, x: y.sum() / x.sum(),
        paired=True,
        vectorized=False,
        n_resamples=999,
        rng=make_rng("bootstrap", 1),
    ).confidence_interval
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_the_bootstrap_of_clusters_resamples_whole_clusters() -> None:
    rng = np.random.default_rng(9)
    per_cluster = rng.normal(0, 1, 40)
    clusters = np.repeat([f"entity {i}" for i in range(40)], 25)
    whole = estimators.bootstrap(per_cluster, resamples=999)
    repeated = estimators.bootstrap(np.repeat(per_cluster, 25), None, clusters, resamples=999)
    assert repeated.n == 40
    assert repeated.value == pytest.approx(whole.value)
    assert repeated.low is not None
    assert repeated.high is not None
    assert whole.low is not None
    assert whole.high is not None
    # clusters in the order of their labels, so other resamples: equal but for the bootstrap's own noise
    assert repeated.high - repeated.low == pytest.approx(whole.high - whole.low, rel=0.1)


def test_where_nothing_varies_the_bootstrap_has_no_width() -> None:
    assert estimators.bootstrap(np.zeros(9), np.arange(1, 10)) == Estimate(0.0, 0.0, 0.0, 9)
    assert estimators.bootstrap(np.full(9, 0.5)) == Estimate(0.5, 0.5, 0.5, 9)
    assert estimators.bootstrap([0.5]) == Estimate(0.5, None, None, 1)
    rounding = estimators.bootstrap(np.arange(1, 10) * 0.1, np.arange(1, 10), resamples=200)
    assert (rounding.low, rounding.high) == (pytest.approx(0.1), pytest.approx(0.1))


def test_the_bootstrap_covers_the_truth() -> None:
    # 400 simulated comparisons of 100 skewed documents: three standard errors of a coverage of .95 are .033
    rng = np.random.default_rng(10)
    covered = 0
    for trial in range(400):
        found = estimators.bootstrap(rng.gamma(2.0, size=100) - 2.0, resamples=400, seed=trial)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0 <= found.high
    assert abs(covered / 400 - 0.95) <= binomial_band(0.95, 400)


def test_bonett_and_price_cover_the_truth() -> None:
    rng = np.random.default_rng(11)
    trials, n = 4000, 500
    flips = rng.multinomial(n, [0.06, 0.04, 0.9], trials)[:, :2].tolist()
    covered = 0
    for lost, gained in flips:
        low, high = estimators.paired_proportion_effect(*items(n, lost, gained)).bounds()
        covered += low <= -0.02 <= high
    assert abs(covered / trials - 0.95) <= binomial_band(0.95, trials)  # .0103


# ------------------------------------------------------------------ the rule


def test_the_rule() -> None:
    def verdict(value: float, error: float) -> str:
        return noninferiority_test(Effect(value, value, error, math.inf, 100), 0.02).verdict

    assert verdict(0.0, 0.005) == "preserved"
    assert verdict(-0.01, 0.005) == "preserved"  # a loss that is significant, and smaller than the margin
    assert verdict(-0.01, 0.01) == "cannot tell"  # a loss that is not significant, and might be larger than the margin
    assert verdict(-0.05, 0.01) == "degraded"
    assert verdict(0.1, 0.01) == "preserved"
    assert verdict(0.0, math.inf) == "cannot tell"
    assert verdict(0.0, 0.0) == "preserved"
    assert verdict(-0.02, 0.0) == "cannot tell"


def test_limits_and_p_values_say_the_same() -> None:
    for value in np.linspace(-0.06, 0.03, 40):
        found = noninferiority_test(Effect(value, value, 0.01, 7, 100), 0.02)
        assert found.lower is not None
        assert found.upper is not None
        assert (found.verdict == "preserved") == (found.lower > -0.02) == (found.p_preserved < 0.05)
        assert (found.verdict == "degraded") == (found.upper < -0.02) == (found.p_degraded < 0.05)
    for lost in range(0, 40, 3):
        share = share_judgment(500, lost, 4, 0.02)
        assert share.lower is not None
        assert share.upper is not None
        assert (share.verdict == "preserved") == (share.lower > -0.02)
        assert (share.verdict == "degraded") == (share.upper < -0.02)


def test_no_flip_among_few_items_preserves_nothing() -> None:
    assert share_judgment(100, 0, 0, 0.02).verdict == "cannot tell"
    assert share_judgment(200, 0, 0, 0.02).verdict == "preserved"


def test_a_margin_that_is_none_is_refused() -> None:
    for margin in (0.0, -0.01, math.nan):
        with pytest.raises(ValueError, match="not a positive number"):
            noninferiority_test(Effect(0.0, 0.0, 0.1, math.inf, 10), margin)


def enumerate_verdicts(n: int, lost_rate: float, gained_rate: float, margin: float) -> dict[str, float]:
    """Return the probability of each verdict by enumeration of (lost, gained)."""
    discordant = n * (lost_rate + gained_rate)
    most = math.ceil(discordant + 6 * math.sqrt(discordant)) + 5
    lost, gained = (counts.ravel() for counts in np.meshgrid(np.arange(most), np.arange(most)))
    lost, gained = lost[lost + gained <= n], gained[lost + gained <= n]
    rates = [lost_rate, gained_rate, 1 - lost_rate - gained_rate]
    chances = stats.multinomial.pmf(np.stack([lost, gained, n - lost - gained], 1), n, rates)
    likely = chances > 1e-6
    found = {"preserved": 0.0, "degraded": 0.0, "cannot tell": 0.0}
    for b, c, chance in zip(lost[likely].tolist(), gained[likely].tolist(), chances[likely].tolist(), strict=True):
        found[share_judgment(n, b, c, margin).verdict] += chance
    assert sum(found.values()) == pytest.approx(1, abs=1e-3)  # rare tables are skipped
    return found


@pytest.mark.parametrize("n", [50, 200, 1000])
@pytest.mark.parametrize("discordant", [0.022, 0.03, 0.05, 0.1])
def test_at_exactly_the_margin_neither_verdict_passes_five_percent(n: int, discordant: float) -> None:
    found = enumerate_verdicts(n, (discordant + 0.02) / 2, (discordant - 0.02) / 2, 0.02)
    assert found["preserved"] <= 0.05
    assert found["degraded"] <= 0.05


def test_either_limit_alone_errs_too_often_where_flips_are_rare() -> None:
    # what docs/comparison.md shows: 200 questions, 2.5 % of the answers flip, at exactly 2 points of loss
    found = enumerate_verdicts(200, 0.0225, 0.0025, 0.02)
    assert found["preserved"] == pytest.approx(0.032, abs=5e-4)
    assert found["degraded"] == pytest.approx(0.0105, abs=5e-4)
    bonett_price = tango = 0.0
    for lost in range(30):
        for gained in range(12):
            chance = stats.multinomial.pmf([lost, gained, 200 - lost - gained], 200, [0.0225, 0.0025, 0.975])
            bonett_price += chance * (
                noninferiority_test(estimators.paired_proportion_effect(*items(200, lost, gained)), 0.02).verdict
                == "preserved"
            )
            tango += chance * (score_test_p(gained, lost, 200, 0.02) < 0.05)
    assert bonett_price == pytest.approx(0.070, abs=5e-4)
    assert tango == pytest.approx(0.057, abs=5e-4)


@pytest.mark.parametrize(("n", "discordant", "chance"), [(500, 0.02, 0.880), (1000, 0.05, 0.866), (2000, 0.1, 0.878)])
def test_how_many_questions_it_takes(n: int, discordant: float, chance: float) -> None:
    found = enumerate_verdicts(n, discordant / 2, discordant / 2, 0.02)
    assert found["preserved"] == pytest.approx(chance, abs=5e-4)


@pytest.mark.parametrize(("tasks", "n", "discordant"), [(2, 1000, 0.006), (4, 500, 0.02), (8, 500, 0.05)])
def test_at_exactly_the_margin_the_macro_average_keeps_its_level(tasks: int, n: int, discordant: float) -> None:
    # Tasks of two choices: 1 point of the chance-normalized average is half a point of accuracy
    rng = np.random.default_rng(13)
    trials, loss = 2000, 0.005
    rates = [(discordant + loss) / 2, (discordant - loss) / 2, 1 - discordant]
    wrong = 0
    for flips in rng.multinomial(n, rates, (trials, tasks))[..., :2].tolist():
        effects = [estimators.paired_proportion_effect(*items(n, lost, gained)) for lost, gained in flips]
        wrong += noninferiority_test(estimators.macro_effect(effects, [2.0] * tasks), 0.01).verdict == "preserved"
    assert wrong / trials <= 0.05 + binomial_band(0.05, trials)


def test_over_seeds_the_rule_keeps_its_level_where_mcnemar_does_not() -> None:
    # No true effect; seeds differ by 1 point; 2 % of 1,000 items flip.
    rng = np.random.default_rng(12)
    trials, n = 1000, 1000
    drift = rng.normal(0, 0.01, (trials, 5))
    lost = rng.binomial(n, np.clip(0.01 - drift / 2, 0, 1))
    gained = rng.binomial(n, np.clip(0.01 + drift / 2, 0, 1))
    one_pair = np.mean(
        [estimators.mcnemar(b, c)[0] < 0.05 for b, c in zip(lost[:, 0].tolist(), gained[:, 0].tolist(), strict=True)]
    )
    effects = [estimators.mean_effect(changes) for changes in (gained - lost) / n]
    recipe = np.mean([2 * min(effect.p_greater(0), effect.p_less(0)) < 0.05 for effect in effects])
    assert one_pair > 0.2
    assert abs(recipe - 0.05) <= binomial_band(0.05, trials)
    at_the_margin = np.mean(
        [
            noninferiority_test(Effect(e.value - 0.02, e.adjusted_value - 0.02, e.stderr, e.dof, 5), 0.02).verdict
            == "preserved"
            for e in effects
        ]
    )
    assert at_the_margin <= 0.05 + binomial_band(0.05, trials)


def test_how_many_seeds_carry_what() -> None:
    assert [evidence_level(n) for n in (1, 2, 3, 4, 5, 9)] == ["none"] * 2 + ["exploration"] * 2 + ["headline"] * 2
