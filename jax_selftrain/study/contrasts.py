"""Contrasts: weighted sums of the changes of cells, seed by seed.

Whether a source suits a student is an interaction: how much better the student does on its text than the average
ability of both explains. The change of student i on text of source j is modeled as

    change(i, j) = student(i) + source(j) + relation(i, j)

and differences of relations are estimated by least squares over the matrix. In such a contrast the weights of every
student and of every source sum to zero, in any design: a source that is bad for all students does not move it. A plain
mean of one relation minus another has this property in balanced designs only.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Literal, get_args

import numpy as np

from jax_selftrain.config import ModelConfig
from jax_selftrain.stats.estimators import Effect, crossed_effect, mean_effect
from jax_selftrain.study.measure_names import MAIN_EFFECT, Cells, group_cells, seed_values

Relation = Literal["self", "same lineage", "stronger other", "other", "cross family"]
"""Relation of a source to a student. *other* has another lineage and no other family; it is *stronger* if its base
ability exceeds the student's by a paired test over the items of the tasks."""
Pairs = Collection[tuple[str, str]]
"""(student, source)."""
Contrast = Mapping[tuple[str, str], float]
"""Weight by (student, treatment)."""
CellKey = tuple[str, str, int]
"""(student, treatment, seed)."""
ItemChanges = Mapping[CellKey, Mapping[str, Mapping[str, np.ndarray]]]
"""By cell, measure and task: the changes of the items, times the task's weight."""
SEPARATOR = " - "
REPORTED: tuple[tuple[Relation, Relation], ...] = (
    ("self", "same lineage"),
    ("same lineage", "stronger other"),
    ("same lineage", "cross family"),
    ("self", "other"),
    ("self", "cross family"),
)
"""Contrasts of every report, where the design has them."""


def parse_contrast(treatment: str) -> tuple[Relation, Relation] | None:
    """Return the relations of `RELATION - RELATION`; None for other treatments."""
    first, _, second = treatment.partition(SEPARATOR)
    relations = {name: name for name in get_args(Relation)}
    if first in relations and second in relations and first != second:
        return relations[first], relations[second]
    return None


def find_relation(student: ModelConfig, source: ModelConfig, stronger: Pairs) -> Relation:
    """Return the relation of a source to a student.

    A source with the student's model is its own text, also at another temperature.
    """
    if student.model == source.model:
        return "self"
    if (student.lineage or student.name) == (source.lineage or source.name):
        return "same lineage"
    if student.family and source.family and student.family != source.family:
        return "cross family"
    return "stronger other" if (student.name, source.name) in stronger else "other"


def relation_contrast(
    models: Mapping[str, ModelConfig],
    pairs: Pairs,
    stronger: Pairs,
    relations: tuple[Relation, Relation],
    student: str = "",
) -> Contrast | None:
    """Return the least-squares weights of a difference of relations.

    Args:
      models: by name.
      pairs: the cells of the matrix.
      stronger: pairs whose source is stronger than the student.
      relations: the contrast is the first minus the second.
      student: the contrast of this student, whose relations then have effects of their own; empty: of all students.

    Returns the weights of the main cells; None if the design cannot estimate the contrast.
    """
    cells = sorted(pairs)
    labels = [
        (("student", one), ("source", other), (one == student, find_relation(models[one], models[other], stronger)))
        for one, other in cells
    ]
    columns = list(dict.fromkeys(label for row in labels for label in row))
    terms = np.array([[label in row for label in columns] for row in labels], float)
    wanted = np.zeros(len(columns))
    for relation, sign in zip(relations, (1.0, -1.0), strict=True):
        if (bool(student), relation) not in columns:
            return None
        wanted[columns.index((bool(student), relation))] = sign
    weights = np.linalg.pinv(terms.T) @ wanted
    if np.abs(terms.T @ weights - wanted).max() > 1e-9:
        return None
    return {
        (one, f"{MAIN_EFFECT}{other}"): float(weight)
        for (one, other), weight in zip(cells, weights, strict=True)
        if abs(weight) > 1e-12
    }


def reported_contrasts(
    models: Mapping[str, ModelConfig], pairs: Pairs, stronger: Pairs
) -> Iterator[tuple[str, str, Contrast]]:
    """Yield the contrasts that the design can estimate.

    As (treatment, student or empty, weights).
    """
    students = list(dict.fromkeys(student for student, _ in pairs))
    for relations in REPORTED:
        for student in ("", *students):
            weights = relation_contrast(models, pairs, stronger, relations, student)
            if weights is not None:
                yield SEPARATOR.join(relations), student, weights


def unrelated_sources(models: Mapping[str, ModelConfig], pairs: Pairs) -> list[str]:
    """Return the sources that are no student's own or of its lineage."""
    related = {
        source
        for student, source in pairs
        if find_relation(models[student], models[source], ()) in ("self", "same lineage")
    }
    return [source for source in dict.fromkeys(source for _, source in pairs) if source not in related]


def contrast_values(cells: Cells, contrast: Contrast, measure: str) -> dict[int, float]:
    """Return a contrast by seed; empty if a cell is missing."""
    groups = group_cells(cells)
    changes = [seed_values(groups.get(key, []), measure) for key in contrast]
    if not changes or any(one.keys() != changes[0].keys() for one in changes):
        return {}
    return {
        seed: sum(weight * one[seed] for weight, one in zip(contrast.values(), changes, strict=True))
        for seed in changes[0]
    }


def measure_step(cells: Cells, contrast: Contrast, measure: str) -> float:
    """Return the change of a share by one item; else 0."""
    key = next(iter(contrast))
    cell = next(cell for cell in cells if (cell["student"], cell["treatment"]) == key)
    if measure == "accuracy":
        tasks = [task for task in cell["tasks"] if task["not_eligible"] is None]
        return float(np.linalg.norm([1 / ((1 - (task["chance"] or 0)) * task["n"]) for task in tasks])) / len(tasks)
    return 1 / cell["measures"][measure]["change"]["n"] if measure.startswith(("task/", "exact_match")) else 0.0


def contrast_effect(cells: Cells, contrast: Contrast, measure: str, items: ItemChanges) -> Effect | None:
    """Estimate a contrast over seeds and items.

    Over seeds alone where their items differ. None if a cell is missing.
    """
    values = list(contrast_values(cells, contrast, measure).values())
    if not values:
        return None
    tables = _item_tables(cells, contrast, measure, items)
    step = _contrast_step(cells, contrast, measure)
    return crossed_effect(list(tables.values()), step) if tables else mean_effect(values, step)


def effect_over_bases(cells: Cells, contrast: Contrast, measure: str, items: ItemChanges) -> Effect | None:
    """Estimate a mean contrast of several students over these and items.

    Each student is one observation, the mean of its seeds: the variance between them contains that of seeds. `n` counts
    students. None if a cell is missing.
    """
    students = list(dict.fromkeys(student for student, _ in contrast))
    parts = [{key: weight * len(students) for key, weight in contrast.items() if key[0] == one} for one in students]
    values = [list(contrast_values(cells, part, measure).values()) for part in parts]
    if not all(values):
        return None
    step = _contrast_step(cells, parts[0], measure)
    tables = [_item_tables(cells, part, measure, items) for part in parts]
    panels = {tuple((task, table.shape[1]) for task, table in one.items()) for one in tables}
    if len(panels) > 1 or not tables[0]:
        return mean_effect([np.mean(one) for one in values], step)
    return crossed_effect([np.stack([one[task].mean(axis=0) for one in tables]) for task in tables[0]], step)


def _contrast_step(cells: Cells, contrast: Contrast, measure: str) -> float:
    """Return the change of a contrast by one item."""
    return float(np.linalg.norm(list(contrast.values()))) * measure_step(cells, contrast, measure)


def _item_tables(cells: Cells, contrast: Contrast, measure: str, items: ItemChanges) -> dict[str, np.ndarray]:
    """Return the contrast of each item [S, n], by task.

    Empty if the items differ.
    """
    seeds = contrast_values(cells, contrast, measure)
    changes = [[items.get((*key, seed), {}).get(measure, {}) for key in contrast] for seed in seeds]
    panels = {tuple((task, one[task].size) for task in sorted(one)) for row in changes for one in row}
    if len(panels) > 1:  # students may have different eligible tasks
        return {}
    weights = np.array(list(contrast.values()))
    return {
        task: np.stack([weights @ np.stack([one[task] for one in row]) for row in changes])
        for task, _ in next(iter(panels))
    }
