"""Power is what simulated studies find, what statsmodels says, and what a dry run tells."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from jax_selftrain.config import ClaimConfig, StudyConfig
from jax_selftrain.stats.power import detectable, power, power_lines

RAISES = ClaimConfig("raises", "text of a", "a")
KEEPS = ClaimConfig("keeps", "text of a", "a", direction="preserves", margin=0.01)
CONFIG = StudyConfig(seeds=(100, 101, 102, 103, 104), claims=(RAISES, KEEPS))


@pytest.mark.parametrize(
    ("effect", "spread", "seeds"), [(0.01, 0.01, 5), (0.02, 0.01, 5), (0.01, 0.005, 3), (0.0, 1.0, 4)]
)
def test_power_is_what_simulated_studies_find(effect: float, spread: float, seeds: int) -> None:
    values = np.random.default_rng(0).normal(effect, spread, (20_000, seeds))
    found = np.mean(stats.ttest_1samp(values, 0.0, axis=1, alternative="greater").pvalue <= 0.05)
    assert power(effect, spread, seeds) == pytest.approx(found, abs=0.012)


def test_power_equals_statsmodels() -> None:
    reference = pytest.importorskip("statsmodels.stats.power", reason="statsmodels is the reference").TTestPower()
    for ratio, seeds, level in ((0.5, 5, 0.05), (1.0, 8, 0.05 / 3), (2.0, 5, 0.025)):
        expected = reference.power(ratio, seeds, level, alternative="larger")
        assert power(ratio, 1.0, seeds, level) == pytest.approx(expected, abs=1e-6)


def test_what_is_detectable_has_the_power_that_was_wanted() -> None:
    for seeds in (5, 10):
        assert power(detectable(0.7, seeds), 0.7, seeds) == pytest.approx(0.8)


def test_a_plan_says_what_its_claims_can_find() -> None:
    said = "\n".join(power_lines(CONFIG))
    assert "over 5 seeds at 0.05, by Holm's method for 2 primary claims" in said
    assert "40 to 58 % for 1 point, 91 to 97 % for 2 points" in said  # spread of a point
    assert "91 to 97 % to be shown within 1 point if nothing changes" in said  # spread of half a point
    assert power_lines(replace(CONFIG, claims=())) == ["no claims are declared: there will be no verdicts"]
    assert power_lines(replace(CONFIG, seeds=(100,))) == ["no claim gets a verdict with 1 seed: that takes 5"]
    nats = replace(CONFIG, claims=(replace(RAISES, measure="log_pz"),))
    assert "not known before a pilot" in power_lines(nats)[1]


def test_a_pilot_says_how_much_seeds_differ() -> None:
    changes = {0: 0.004, 1: -0.004, 2: 0.0}
    cells = [
        {
            "student": "a",
            "treatment": "text of a",
            "seed": seed,
            "measures": {"accuracy": {"change": {"value": change}}},
        }
        for seed, change in changes.items()
    ]
    (_, said, _) = power_lines(CONFIG, {"cells": cells, "interaction": None})
    assert "with a spread of 0.4 points (measured)" in said
    best, worst = (100 * detectable(0.004, 5, level) for level in (0.05, 0.025))
    assert f"80 % for a change of {best:.3g} points at best, {worst:.3g} points at worst" in said
