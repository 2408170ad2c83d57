"""The power of a study's claims, as `study --dry-run` prints it."""

from __future__ import annotations

from dataclasses import replace

from jax_selftrain.config import ClaimConfig, StudyConfig
from jax_selftrain.stats.power import minimum_detectable_effect
from jax_selftrain.study.power_analysis import describe_power

RAISES = ClaimConfig("raises", "source a", "a")
KEEPS = ClaimConfig("keeps", "source a", "a", direction="preserves", margin=0.01)
CONFIG = StudyConfig(seeds=(100, 101, 102, 103, 104), claims=(RAISES, KEEPS))


def test_a_dry_run_describes_the_power_of_each_claim() -> None:
    lines = "\n".join(describe_power(CONFIG))
    assert "over 5 seeds at 0.05, with Holm's method for 2 primary claims" in lines
    assert "40 to 58 % for 1 point, 91 to 97 % for 2 points" in lines  # with one of a point
    # With a standard deviation of half a point.
    assert "91 to 97 % to show a change within 1 point if nothing changes" in lines
    assert describe_power(replace(CONFIG, claims=())) == ["no claims are declared: there will be no verdicts"]
    assert describe_power(replace(CONFIG, seeds=(100,))) == ["no claim gets a verdict with 1 seed: a verdict needs 5"]
    nats = replace(CONFIG, claims=(replace(RAISES, measure="log_pz"),))
    assert "unknown without a pilot" in describe_power(nats)[1]


def test_a_pilot_gives_the_standard_deviation_over_seeds() -> None:
    changes = {0: 0.004, 1: -0.004, 2: 0.0}
    cells = [
        {
            "student": "a",
            "treatment": "source a",
            "seed": seed,
            "measures": {"accuracy": {"change": {"value": change}}},
        }
        for seed, change in changes.items()
    ]
    (_, line, _) = describe_power(CONFIG, {"cells": cells, "interaction": None})
    assert "with a standard deviation of 0.4 points (measured)" in line
    best, worst = (100 * minimum_detectable_effect(0.004, 5, level) for level in (0.05, 0.025))
    assert f"80 % for a change of {best:.3g} points at best, {worst:.3g} points at worst" in line
