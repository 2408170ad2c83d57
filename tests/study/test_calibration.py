"""Coverage of intervals in simulated studies, also of naive methods.

Items differ in difficulty and belong to entities that react to training in their own way. Seeds have better or worse
students; sources are good or bad for all students. The functions under test are those of the report.
`python tests/study/test_calibration.py 40000` runs at full size.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from jax_selftrain.stats import estimators
from jax_selftrain.stats.estimators import Estimate
from jax_selftrain.study.results import interactions, treatment_effects

STUDIES = 3_000
SEEDS = 5
RECIPE = 0.02
"""The true change of accuracy."""


def covers(estimate: Estimate, truth: float) -> bool:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high


def cell(student: str, source: str, seed: int, change: Estimate) -> dict[str, Any]:
    measure = {"before": {"value": 0.5}, "change": asdict(change)}
    measures = {"accuracy": measure}
    return {"student": student, "treatment": f"source {source}", "source": source, "seed": seed, "measures": measures}


def parse_estimate(entry: dict[str, Any]) -> Estimate:
    return Estimate(entry["value"], entry["low"], entry["high"], entry["n"])


def recipe_coverage(rng: np.random.Generator, studies: int) -> dict[str, float]:
    """Return the coverage of a recipe's effect, by seeds and by items."""
    items, found = 1000, {"t over seeds": 0, "one pair's items": 0, "all items of all seeds": 0}
    for _ in range(studies):
        p = rng.uniform(0.25, 0.75, items)
        before = rng.random(items) < p
        better = rng.normal(0, 0.03, (SEEDS, 1))
        after = rng.random((SEEDS, items)) < p + RECIPE + better
        truth = float(p.mean() + RECIPE - before.mean())
        pairs = [estimators.paired_proportion_effect(before, one).estimate() for one in after]
        (effect,) = treatment_effects([cell("a", "a", seed, pair) for seed, pair in enumerate(pairs)])
        found["t over seeds"] += covers(parse_estimate(effect["measures"]["accuracy"]["change"]), truth)
        found["one pair's items"] += covers(pairs[0], truth)
        pooled = estimators.paired_proportion_effect(np.tile(before, SEEDS), after.ravel()).estimate()
        found["all items of all seeds"] += covers(pooled, truth)
    return {name: hits / studies for name, hits in found.items()}


def pair_coverage(rng: np.random.Generator, studies: int) -> dict[str, float]:
    """Return the coverage of one pair's change, by entities and by items."""
    entities, each, found = 100, 8, {"entities as units": 0, "items as units": 0}
    labels = np.repeat(np.arange(entities), each)
    for _ in range(studies):
        p = rng.uniform(0.3, 0.6, entities)[labels]
        reacts = rng.uniform(-0.25, 0.25, entities)[labels]
        before, after = rng.random(labels.size) < p, rng.random(labels.size) < p + RECIPE + reacts
        found["entities as units"] += covers(
            estimators.paired_proportion_effect(before, after, labels).estimate(), RECIPE
        )
        found["items as units"] += covers(estimators.paired_proportion_effect(before, after).estimate(), RECIPE)
    return {name: hits / studies for name, hits in found.items()}


def interaction_coverage(rng: np.random.Generator, studies: int) -> dict[str, float]:
    """Return the coverage of home − away, with and without an interaction."""
    names, found = ("a", "b"), {}
    for relation in (0.0, 0.02):
        hits = 0
        for _ in range(studies):
            source, student = rng.normal(0, 0.05, (2, 2))
            cells = []
            for seed in range(SEEDS):
                noise = rng.normal(0, 0.01, (2, 2))
                for i, reader in enumerate(names):
                    for j, writer in enumerate(names):
                        change = student[i] + source[j] + noise[i, j] + relation * (i == j)
                        cells.append(cell(reader, writer, seed, Estimate(float(change), None, None, 1)))
            crossed = interactions(cells, {name: name for name in names})
            assert crossed is not None
            hits += covers(parse_estimate(crossed["measures"]["accuracy"]["contrast"]), relation)
        found[f"home − away, relation {relation:g}"] = hits / studies
    return found


def test_a_recipe_is_judged_by_its_seeds() -> None:
    found = recipe_coverage(np.random.default_rng(1), STUDIES)
    assert 0.94 <= found["t over seeds"] <= 0.96
    assert found["one pair's items"] < 0.9
    assert found["all items of all seeds"] < 0.9


def test_questions_about_one_entity_are_one_observation() -> None:
    found = pair_coverage(np.random.default_rng(2), STUDIES)
    assert 0.94 <= found["entities as units"] <= 0.96
    assert found["items as units"] < 0.93


@pytest.mark.parametrize(
    ("studies", "error"), [(1_000, 0.02), pytest.param(3 * STUDIES, 0.01, marks=pytest.mark.nightly)]
)
def test_bad_sources_and_slow_students_are_no_relation(studies: int, error: float) -> None:
    """The standard error of the coverage is 0.007 or 0.0023."""
    found = interaction_coverage(np.random.default_rng(3), studies)
    assert all(abs(share - 0.95) <= error for share in found.values()), found


if __name__ == "__main__":
    size = int(sys.argv[1]) if len(sys.argv) > 1 else STUDIES
    for simulate in (recipe_coverage, pair_coverage, interaction_coverage):
        for name, share in simulate(np.random.default_rng(0), size).items():
            print(f"{name}: {share:.4f}")
