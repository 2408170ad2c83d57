"""Standard errors against what they estimate."""

import math

import numpy as np
import pytest

from jax_selftrain.stats.estimators import exp_and_stderr, mean_and_stderr, ratio_and_stderr, wilson_interval


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


def test_wilson_stays_inside_and_has_width_at_the_ends():
    low, high = wilson_interval([False] * 50)
    assert (low, high) == pytest.approx((0.0, 1.959964**2 / (50 + 1.959964**2)), abs=1e-6)
    assert wilson_interval([True] * 50) == pytest.approx([1 - high, 1.0], abs=1e-12)
