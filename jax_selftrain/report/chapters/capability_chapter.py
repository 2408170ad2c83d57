"""Chapters on tasks and on perplexity of texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jax_selftrain.report import figures
from jax_selftrain.report import formatting as fmt
from jax_selftrain.report.formatting import Records, Results
from jax_selftrain.report.page import Chapter
from jax_selftrain.report.tables import Column, Table, make_columns, make_side_columns
from jax_selftrain.stats.estimators import Estimate
from jax_selftrain.study.measure_names import common_measures

ONE_SEED_NOTE = "Intervals are over seeds; with one seed they are over the items of one pair of checkpoints."


def write_capability(results: Results) -> Chapter | None:
    """Return the chapter on tasks."""
    cells = results["cells"]
    if not cells[0]["tasks"]:
        return None
    chapter, several = Chapter("Capability"), len(cells) > 1
    if several:
        for student in results["design"]["students"]:
            _add_effects(chapter, student, fmt.select_student(results["effects"], student))
    else:
        _add_task_figure(chapter, cells[0]["tasks"])
    chapter.add_table(_make_task_table(cells), folded=several)
    chapter.add_note(
        "An answer is correct when the correct choice has the highest likelihood. Chance-normalized means (accuracy − "
        "chance) / (1 − chance). The macro average weights the eligible tasks equally: tasks in which the base is more "
        f"than four standard errors above chance and below 95 %. {ONE_SEED_NOTE} Changes are paired by question. "
        "McNemar's exact p tests whether losses and gains are equally likely; q is p after Benjamini and Hochberg's "
        "correction over the tasks. Log-odds (nats) compare the correct choice with all other choices; for last-word "
        "tasks the column shows the log-likelihood of the word."
    )
    return chapter


def _add_effects(chapter: Chapter, student: str, effects: Records) -> None:
    names, key = common_measures(effects), fmt.slugify(student)
    if "accuracy" in names:
        entries = [one["measures"]["accuracy"] for one in effects]
        svg = figures.plot_effects(
            f"capability_{key}",
            [one["treatment"] for one in effects],
            [fmt.parse_displayed(entry["change"], "accuracy") for entry in entries],
            [[100 * value for value in entry["seeds"]] for entry in entries],
            label="change: chance-normalized macro accuracy (points)",
        )
        chapter.add_figure(f"capability_{key}", svg, f"{student}: all treatments, with a dot for each seed.")
    for name, caption, starts in (
        ("capability", "accuracy by task", ("accuracy", "task/")),
        ("log_odds", "log-odds of the correct choice by task", ("log_odds",)),
    ):
        measures = [measure for measure in names if measure.startswith(starts)]
        if measures:
            chapter.add_table(fmt.make_effect_table(f"{name}_{key}", f"{student}, {caption}", effects, measures))


def _add_task_figure(chapter: Chapter, tasks: Records) -> None:
    svg = figures.plot_before_and_after(
        "tasks",
        [task["name"] for task in tasks],
        [fmt.parse_displayed_sides(task["accuracy"], "task/") for task in tasks],
        value_label="accuracy (%)",
        change_label="change (points)",
        marks=[None if task["chance"] is None else 100 * task["chance"] for task in tasks],
        mark_label="chance",
    )
    chapter.add_figure("tasks", svg, "Accuracy before and after, and the paired change, with 95 % intervals.")


def _make_task_table(cells: Records) -> Table:
    heads = [
        *make_columns("task", "n"),
        Column("chance", "chance (%)", 1, 100),
        Column("eligible", "in the macro average"),
        *make_side_columns("accuracy", "accuracy (%)"),
        *make_columns("lost", "gained"),
        Column("mcnemar_p", "McNemar p", p_value=True),
        Column("q", p_value=True),
        Column("log_odds_change", "change of log-odds", signed=True),
    ]
    rows = [(cell, _make_task_row(task)) for cell in cells for task in cell["tasks"]]
    rows += [
        (cell, (name, cell["macro"]["n"], None, None, *fmt.parse_sides(cell["macro"][key]), *(None,) * 5))
        for cell in cells
        if cell["macro"]
        for name, key in (("macro average", "accuracy"), ("chance-normalized macro average", "chance_normalized"))
    ]
    return fmt.make_cell_table("tasks", "Tasks before and after", heads, rows)


def _make_task_row(task: Mapping[str, Any]) -> tuple[Any, ...]:
    log_odds = task.get("log_odds") or task["word_loglikelihood"]
    return (
        *fmt.pick(task, "name", "n", "chance"),
        task["not_eligible"] or "yes",
        *fmt.parse_sides(task["accuracy"]),
        *fmt.pick(task["flips"], "lost", "gained", "mcnemar_p", "q"),
        fmt.parse_estimate(log_odds["change"]),
    )


def write_perplexity(results: Results) -> Chapter | None:
    """Return the chapter on texts."""
    cells = results["cells"]
    if not cells[0]["texts"]:
        return None
    chapter, several = Chapter("Perplexity"), len(cells) > 1
    for student in results["design"]["students"] if several else ():
        effects = fmt.select_student(results["effects"], student)
        names = [name for name in common_measures(effects) if name.startswith("text/")]
        chapter.add_table(
            fmt.make_effect_table(f"texts_{fmt.slugify(student)}", f"{student}, held-out texts", effects, names)
        )
    heads = [
        *make_columns("text", "documents", "tokens"),
        *make_side_columns("nll", "nats per token", 4, 1),
        Column("perplexity_before", "perplexity, before", 2),
        Column("perplexity_after", "after", 2),
        Column("documents_better", "documents with a lower loss"),
    ]
    rows = [
        (
            cell,
            (
                *fmt.pick(text, "name", "documents", "tokens"),
                *(nll := fmt.parse_sides(text["nll"])),
                *map(_exponentiate, nll[:2]),
                text["documents_better"],
            ),
        )
        for cell in cells
        for text in cell["texts"]
    ]
    chapter.add_table(fmt.make_cell_table("texts", "Texts before and after", heads, rows), folded=several)
    chapter.add_note(
        "Each document is scored from the BOS token on; lower is better. Intervals take the document as the unit, "
        "because tokens of one text are not independent. Changes are paired by document."
    )
    return chapter


def _exponentiate(estimate: Estimate | None) -> Estimate | None:
    if estimate is None:
        return None
    low, high = (None if end is None else math.exp(end) for end in (estimate.low, estimate.high))
    return Estimate(math.exp(estimate.value), low, high, estimate.n)
