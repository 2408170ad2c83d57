"""Coverage of intervals in simulated studies, also of naive methods.

Items differ in difficulty and belong to entities that react to training in their own way. Seeds have better or worse
students; sources are good or bad for all students. The functions under test are those of the report.
`python tests/study/test_calibration.py 40000` runs at full size.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from jax_selftrain.config import ModelConfig
from jax_selftrain.stats import estimators
from jax_selftrain.stats.estimators import Estimate, crossed_effect
from jax_selftrain.study.contrasts import contrast_effect, effect_over_bases, relation_contrast
from jax_selftrain.study.results import treatment_effects

STUDIES = 3_000
SEEDS = 5
RECIPE = 0.02
"""The true change of accuracy."""


def covers(estimate: Estimate, truth: float) -> bool:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high


def cell(student: str, source: str, seed: int, change: Estimate) -> dict[str, Any]:
    return {
        **{"student": student, "treatment": f"source {source}", "source": source, "seed": seed},
        "identical": False,
        "tasks": [{"n": 1000, "chance": 0.0, "not_eligible": None}],
        "measures": {"accuracy": {"before": {"value": 0.5}, "change": asdict(change)}},
    }


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
        (effect,) = treatment_effects([cell("a", "a", seed, pair) for seed, pair in enumerate(pairs)], {})
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


LINEAGES = {"A1": "A", "A2": "A", "A3": "A", "B1": "B", "S": "S", "C1": "C"}
"""Six sources; the students are A1, B1 and C1. The design is not balanced: three sources share the lineage of A1."""


def relation_coverage(
    rng: np.random.Generator, studies: int, spread: float = 0.05
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the coverage of *self − other*, and the shares of wrong verdicts without a relation.

    The naive method is the mean of own text and own lineage minus the mean of all other text.
    """
    models = {name: ModelConfig(name, name, lineage=lineage) for name, lineage in LINEAGES.items()}
    students = ("A1", "B1", "C1")
    pairs = [(student, source) for student in students for source in models]
    contrast = relation_contrast(models, pairs, (), ("self", "other"))
    assert contrast is not None
    home = np.array([[LINEAGES[one] == LINEAGES[other] for other in models] for one in students])
    found, wrong = {}, {"least squares": 0, "home − away": 0}
    for relation in (0.0, 0.02):
        hits = 0
        for _ in range(studies):
            abilities = rng.normal(0, spread, 3)[:, None] + rng.normal(0, spread, 6)
            own = np.array([[one == other for other in models] for one in students])
            changes = abilities + relation * own + rng.normal(0, 0.01, (SEEDS, 3, 6))
            cells = [
                cell(student, source, seed, Estimate(float(changes[seed, i, j]), None, None, 1000))
                for seed in range(SEEDS)
                for i, student in enumerate(students)
                for j, source in enumerate(models)
            ]
            effect = contrast_effect(cells, contrast, "accuracy", {})
            assert effect is not None
            hits += covers(effect.estimate(), relation)
            if not relation:
                wrong["least squares"] += not covers(effect.estimate(), 0.0)
                means = [
                    [row[one].mean() - row[~one].mean() for row, one in zip(rows, home, strict=True)]
                    for rows in changes
                ]
                wrong["home − away"] += not covers(estimators.mean(np.mean(means, axis=1)), 0.0)
        found[f"self − other, truly {relation:g}"] = hits / studies
    return found, {name: count / studies for name, count in wrong.items()}


def crossed_coverage(rng: np.random.Generator, studies: int) -> dict[str, tuple[float, float]]:
    """Return the coverage of the change on new items, over seeds alone and over seeds and items.

    By the share of the items that change in every seed. In each seed, 4 % more change at random.
    """
    found = {}
    for share in (0.0, 0.02, 0.04, 0.08):
        hits = np.zeros(2)
        for _ in range(studies):
            fixed, free = (
                rng.choice((-1.0, 0.0, 1.0), shape, p=(p / 2, 1 - p, p / 2))
                for p, shape in ((share, (1, 1000)), (0.04, (SEEDS, 1000)))
            )
            changes = np.where(fixed == 0, free, fixed)
            for place, effect in enumerate((estimators.mean_effect(changes.mean(axis=1)), crossed_effect([changes]))):
                hits[place] += covers(effect.estimate(), 0.0)
        found[f"{share:.0%} of the items change in every seed"] = (hits[0] / studies, hits[1] / studies)
    return found


def base_coverage(rng: np.random.Generator, studies: int) -> dict[str, tuple[float, float]]:
    """Return the coverage of a recipe's effect on new bases, over seeds and over bases.

    By the standard deviation between six bases of three seeds. Seeds and 500 items differ too.
    """
    bases, seeds, found = [f"base {n}" for n in range(6)], range(3), {}
    contrast = {(base, f"source {base}"): 1 / len(bases) for base in bases}
    for spread in (0.0, 0.005, 0.01, 0.02):
        hits = np.zeros(2)
        for _ in range(studies):
            of_items = rng.normal(0, 0.1, 500)
            changes = rng.normal(0, spread, (6, 1, 1)) + rng.normal(0, 0.01, (6, 3, 1)) + of_items
            changes = RECIPE + changes + rng.normal(0, 0.2, (6, 3, 500))
            cells, items = [], {}
            for (n, base), seed in itertools.product(enumerate(bases), seeds):
                cells.append(cell(base, base, seed, Estimate(float(changes[n, seed].mean()), None, None, 500)))
                items[base, f"source {base}", seed] = {"accuracy": {"task": changes[n, seed]}}
            for place, estimate in enumerate((contrast_effect, effect_over_bases)):
                effect = estimate(cells, contrast, "accuracy", items)
                assert effect is not None
                hits[place] += covers(effect.estimate(), RECIPE)
        found[f"bases differ by {spread:g}"] = (hits[0] / studies, hits[1] / studies)
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
    ("studies", "error"), [(500, 0.03), pytest.param(3 * STUDIES, 0.01, marks=pytest.mark.nightly)]
)
def test_bad_sources_and_slow_students_are_no_relation(studies: int, error: float) -> None:
    """Coverage has a standard error of 0.01 or 0.0023; the naive contrast is wrong in most studies."""
    found, wrong = relation_coverage(np.random.default_rng(3), studies)
    assert all(abs(share - 0.95) <= error for share in found.values()), found
    assert wrong["least squares"] <= 0.05 + error
    assert wrong["home − away"] > 0.5


def test_items_are_crossed_only_where_all_cells_have_the_same() -> None:
    rng = np.random.default_rng(5)
    cells = [cell("a", source, seed, Estimate(0.0, None, None, 1000)) for source in "ab" for seed in range(SEEDS)]
    fixed = rng.choice((-1.0, 1.0), 100)
    items = {
        ("a", f"source {source}", seed): {"accuracy": {"one": fixed * (source == "a") + rng.normal(0, 0.01, 100)}}
        for source in "ab"
        for seed in range(SEEDS)
    }
    contrast = {("a", "source a"): 1.0, ("a", "source b"): -1.0}
    crossed = contrast_effect(cells, contrast, "accuracy", items)
    assert crossed is not None
    assert crossed.stderr == pytest.approx(0.1, rel=0.05)  # of 100 items, in every seed
    items["a", "source b", 0] = {"accuracy": {"two": fixed}}
    alone = contrast_effect(cells, contrast, "accuracy", items)
    assert alone == contrast_effect(cells, contrast, "accuracy", {})


@pytest.mark.parametrize(
    ("studies", "error"), [(300, 0.04), pytest.param(3 * STUDIES, 0.01, marks=pytest.mark.nightly)]
)
def test_items_that_change_in_every_seed_are_one_observation(studies: int, error: float) -> None:
    """The standard error of the coverage is 0.013 or 0.0023."""
    found = crossed_coverage(np.random.default_rng(4), studies)
    assert all(abs(crossed - 0.95) <= error for _, crossed in found.values()), found
    assert list(found.values())[-1][0] < 0.65


@pytest.mark.parametrize(("studies", "error"), [(150, 0.05), pytest.param(STUDIES, 0.015, marks=pytest.mark.nightly)])
def test_bases_that_react_in_their_own_way_are_observations(studies: int, error: float) -> None:
    """The standard error of the coverage is 0.018 or 0.004."""
    found = base_coverage(np.random.default_rng(6), studies)
    assert all(0.95 - error <= over_bases for _, over_bases in found.values()), found
    assert list(found.values())[-1][0] < 0.85


if __name__ == "__main__":
    size = int(sys.argv[1]) if len(sys.argv) > 1 else STUDIES
    for simulate in (recipe_coverage, pair_coverage, crossed_coverage, base_coverage, relation_coverage):
        print(simulate.__name__, simulate(np.random.default_rng(0), size))
    for spread in (0.01, 0.03, 0.05):
        _, wrong = relation_coverage(np.random.default_rng(0), size, spread)
        print(f"wrong verdicts, sources differ by {spread:g}:", wrong)
