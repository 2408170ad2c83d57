"""Power against simulation and statsmodels."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from jax_selftrain.stats.noninferiority import minimum_detectable_effect, power


@pytest.mark.parametrize(
    ("effect", "stddev", "seeds"), [(0.01, 0.01, 5), (0.02, 0.01, 5), (0.01, 0.005, 3), (0.0, 1.0, 4)]
)
def test_power_is_the_rate_of_simulated_rejections(effect: float, stddev: float, seeds: int) -> None:
    values = np.random.default_rng(0).normal(effect, stddev, (20_000, seeds))
    rate = np.mean(stats.ttest_1samp(values, 0.0, axis=1, alternative="greater").pvalue <= 0.05)
    assert power(effect, stddev, seeds) == pytest.approx(rate, abs=0.012)


def test_power_equals_statsmodels() -> None:
    reference = pytest.importorskip("statsmodels.stats.power", reason="statsmodels is the reference").TTestPower()
    for ratio, seeds, level in ((0.5, 5, 0.05), (1.0, 8, 0.05 / 3), (2.0, 5, 0.025)):
        expected = reference.power(ratio, seeds, level, alternative="larger")
        assert power(ratio, 1.0, seeds, level) == pytest.approx(expected, abs=1e-6)


def test_minimum_detectable_effect_has_the_target_power() -> None:
    for seeds in (5, 10):
        assert power(minimum_detectable_effect(0.7, seeds), 0.7, seeds) == pytest.approx(0.8)
