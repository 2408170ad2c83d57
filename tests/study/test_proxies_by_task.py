"""Similarity by task and the gain on this task, in simulated studies with known truth; own text at two temperatures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jax_selftrain.config import ModelConfig
from jax_selftrain.report.chapters.capability_chapters import write_proxies
from jax_selftrain.study.contrasts import find_relation
from jax_selftrain.study.proxy_relations import TaskProxies, judge_relations, judge_tasks, relate_proxies

TASKS = ("a", "b", "c", "d")
STUDENTS = 3


def simulate(rng: np.random.Generator, sources: int, links: dict[str, float]) -> dict[str, TaskProxies]:
    """Simulate two proxies and the gain on each task, with effects of sources that all tasks and students share."""

    def shared() -> np.ndarray:
        return rng.normal(size=sources) + 0.5 * rng.normal(size=(STUDENTS, sources))

    common, gains = shared(), shared()
    found: dict[str, TaskProxies] = {}
    for task in TASKS:
        own = shared()
        similarity = 0.5 * common + own
        proxies = {"similarity": similarity, "semantic_similarity": similarity + 0.3 * shared()}
        effects = gains + shared() + links.get(task, 0.0) * own
        found[task] = proxies, effects[None], rng.normal(size=sources)
    return found


def related(relations: list[dict[str, Any]]) -> set[str]:
    return {one["name"] for one in relations if one["verdict"] == "related"}


def test_the_similarity_to_one_task_is_found_by_task_and_not_in_the_macro_average() -> None:
    rng, runs = np.random.default_rng(0), 6
    found, others, macro = 0, 0, 0
    for _ in range(runs):
        tasks = simulate(rng, 12, {"a": 5.0})
        judged = judge_tasks(tasks)
        hits = {one["task"] for one in judged["by_task"] if "similarity" in related(one["relations"])}
        found, others = found + ("a" in hits), others + len(hits - {"a"})
        means = [np.mean([part[0]["similarity"] for part in tasks.values()], axis=0)]
        gains = np.mean([part[1] for part in tasks.values()], axis=0)
        macro += bool(related(judge_relations({"similarity": means[0]}, gains)))
    assert found >= runs - 1
    assert others <= 1
    assert macro <= runs // 2


def test_what_holds_weakly_for_every_task_is_found_over_tasks() -> None:
    rng, runs = np.random.default_rng(1), 4
    judged = [judge_tasks(simulate(rng, 12, dict.fromkeys(TASKS, 2.0))) for _ in range(runs)]
    assert sum("similarity" in related(one["over_tasks"]) for one in judged) >= runs - 1
    for one in judged:
        pooled, parts = one["over_tasks"][0], [part["relations"][0] for part in one["by_task"]]
        assert pooled["cells"] == sum(part["cells"] for part in parts)
        assert pooled["correlation"] == pytest.approx(np.mean([part["correlation"] for part in parts]))  # equal rows
        assert pooled["low"] < pooled["correlation"] < pooled["high"]


@pytest.mark.parametrize("studies", [40, pytest.param(1000, marks=pytest.mark.nightly)])
def test_unrelated_similarities_are_called_related_in_few_studies(studies: int) -> None:
    rng, own = np.random.default_rng(2), np.eye(STUDENTS, 6, dtype=bool)
    any_related, pooled, unadjusted = 0, 0, 0
    for _ in range(studies):
        judged = judge_tasks(simulate(rng, 6, {}), self_mask=own)
        relations = [relation for one in judged["by_task"] for relation in one["relations"]]
        any_related += bool(related(relations))
        pooled += bool(related(judged["over_tasks"]))
        unadjusted += any(one["p"] <= 0.05 for one in relations)
    noise = 2.6 * np.sqrt(0.06 * 0.94 / studies) if studies < 1000 else 0.0
    assert any_related / studies <= 0.06 + noise
    assert pooled / studies <= 0.06 + noise
    assert unadjusted / studies > 0.1  # each task and proxy by itself


MODELS = {
    name: ModelConfig(name, model, temperature=temperature)
    for name, model, temperature in [
        *(("A", "models/a", None), ("A cool", "models/a", 0.7)),
        *((name, f"models/{name}", None) for name in "BCDEF"),
    ]
}


def make_cells(rng: np.random.Generator, ineligible: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Return the cells of students A and B; B may have ineligible tasks."""

    def measures(student: str, source: str) -> dict[str, Any]:
        special = 5.0 * (MODELS[student].model == MODELS[source].model)
        changes = {"accuracy": rng.normal() + special, "task/a": rng.normal(), "task/b": rng.normal()}
        return {name: {"change": {"value": value}} for name, value in changes.items()}

    return [
        {
            **{"student": student, "source": source, "treatment": f"source {source}", "seed": 100},
            "measures": measures(student, source),
            "tasks": [
                {"name": task, "not_eligible": "as chance" if task == "b" and student in ineligible else None}
                for task in "ab"
            ],
            "proxies": {"similarity": rng.normal()},
            "task_proxies": {task: {"similarity": rng.normal()} for task in "ab"},
        }
        for student in "AB"
        for source in MODELS
    ]


def test_the_own_text_at_another_temperature_is_own_text() -> None:
    assert [find_relation(MODELS["A"], source, ()) for source in MODELS.values()] == ["self"] * 2 + ["other"] * 5
    assert find_relation(MODELS["A cool"], MODELS["A"], ()) == "self"
    cells = make_cells(np.random.default_rng(3))
    found = relate_proxies(cells, MODELS, "AB", list(MODELS), {})
    assert found is not None
    table = {(cell["student"], cell["source"]): cell for cell in cells}
    values, gains = (
        np.array([[get(table[student, source]) for source in MODELS] for student in "AB"])
        for get in (
            lambda cell: cell["proxies"]["similarity"],
            lambda cell: cell["measures"]["accuracy"]["change"]["value"],
        )
    )
    own = np.array([[True, True, False, False, False, False, False], [False, False, True, False, False, False, False]])
    (expected,) = judge_relations({"similarity": values}, gains[None], self_mask=own)
    assert found["relations"] == [expected]
    own[0, 1] = False  # by name, the cool text would be another source's
    assert judge_relations({"similarity": values}, gains[None], self_mask=own) != [expected]


def test_a_task_counts_for_students_whose_base_is_eligible() -> None:
    whole, part, none = (
        relate_proxies(make_cells(np.random.default_rng(4), students), MODELS, "AB", list(MODELS), {})
        for students in ((), ("B",), ("A", "B"))
    )
    assert whole is not None
    assert part is not None
    assert none is not None
    sizes = [{one["task"]: one["relations"][0]["cells"] for one in found["by_task"]} for found in (whole, part, none)]
    assert sizes == [{"a": 14, "b": 14}, {"a": 14, "b": 7}, {"a": 14}]
    assert [found["over_tasks"][0]["cells"] for found in (whole, part, none)] == [28, 21, 14]
    assert part["by_task"][0]["relations"][0]["correlation"] == whole["by_task"][0]["relations"][0]["correlation"]


def test_the_report_has_a_table_by_benchmark() -> None:
    cells = make_cells(np.random.default_rng(5))
    results: dict[str, Any] = {"cells": cells, "config": {}}
    results["proxies"] = relate_proxies(cells, MODELS, "AB", list(MODELS), {})
    chapter = write_proxies(results)
    assert chapter is not None
    tables = {table.name: table for table in chapter.tables}
    assert [record["task"] for record in tables["proxies_by_task"].records] == ["a", "b", "all tasks"]
