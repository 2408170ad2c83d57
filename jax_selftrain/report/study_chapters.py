"""The chapters of a study's report, made from `results.json` and nothing else: prose, figures and tables."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import yaml

from jax_selftrain.report import figures
from jax_selftrain.report.decoupling_chapter import decoupling_figure
from jax_selftrain.report.effect_table import ONE_SEED_NOTE, effect_table
from jax_selftrain.report.formatting import decimals, label, parse_change, parse_estimate, slug, to_display_units
from jax_selftrain.report.memorization_chapter import memorization_chapter
from jax_selftrain.report.page import Chapter, figure_html, note_html
from jax_selftrain.report.proxy_chapter import proxy_chapter
from jax_selftrain.report.tables import Column, Table
from jax_selftrain.study.measure_names import (
    MAIN_EFFECT,
    common_measures,
    display_scale,
    is_primary_format,
    main_measure,
)

Results = Mapping[str, Any]


def study_chapters(results: Results) -> list[Chapter]:
    """The chapters that these results have something to say in, in their order."""
    written = (
        _design(results),
        _cross_model_matrix(results),
        _capability(results),
        decoupling_figure(results),
        memorization_chapter(results),
        proxy_chapter(results),
        _perplexity_table(results),
        _samples(results),
        _limits(),
        _provenance(results),
    )
    return [chapter for chapter in written if chapter is not None]


def _design(results: Results) -> Chapter:
    axes = ("lineage", "data", "data_order", "initialization", "tokenizer", "architecture", "size")
    strengths = results["base_ability"]
    measured = list(dict.fromkeys(name for one in strengths.values() for name in one))
    design = results["design"]
    rows = tuple(
        (
            model["name"],
            " and ".join(
                role
                for role, names in (("source", design["sources"]), ("student", design["students"]))
                if model["name"] in names
            ),
            *(model[axis] or ("itself" if axis == "lineage" else "not said") for axis in axes),
            *(strengths.get(model["name"], {}).get(name) for name in measured),
        )
        for model in design["models"]
    )
    columns = (
        Column("model", "model"),
        Column("role", "role"),
        *(Column(axis, axis.replace("_", " ")) for axis in axes),
        *(Column(name, name) for name in measured),
    )
    table = Table("models", "The models, and what they can do before anything", columns, rows)
    budget = _budget(results)
    note = (
        "Accuracy on tasks, bits per byte on texts. Steps, batch and learning rate are the same for all but where an "
    )
    note += "arm says otherwise; tokens differ by how well documents fill rows."
    return Chapter("Design", table.to_html() + budget.to_html() + note_html(note), (table, budget))


def _budget(results: Results) -> Table:
    """Of every student and treatment, the means over seeds."""
    corpora = results["corpora"]
    rows = []
    for one in results["effects"]:
        key = one["student"], one["treatment"]
        cells = [cell for cell in results["cells"] if (cell["student"], cell["treatment"]) == key]
        trained = [cell["training"] for cell in cells if cell["training"]]
        read = [corpora[cell["corpus"]] for cell in cells if cell["corpus"]]
        values = (
            *([part[name] for part in trained] for name in ("steps", "targets")),
            *([part[name] for part in read] for name in ("samples", "tokens")),
        )
        rows.append((*key, len(cells), *(round(sum(found) / len(found)) if found else None for found in values)))
    columns = (
        Column("student", "student"),
        Column("treatment", "treatment"),
        Column("seeds", "seeds"),
        Column("steps", "steps"),
        Column("targets", "tokens predicted"),
        Column("samples", "documents in the corpus"),
        Column("tokens", "its tokens"),
    )
    return Table("budget", "What each student was trained on, means over seeds", columns, tuple(rows))


def _cross_model_matrix(results: Results) -> Chapter:
    main = main_measure(results)
    matrix = [one for one in results["effects"] if one["treatment"] == f"{MAIN_EFFECT}{one['source']}"]
    names = [name for name in common_measures(matrix) if is_primary_format(name)]
    rows = tuple(
        (
            one["student"],
            one["source"],
            len(one["seeds"]),
            *(to_display_units(parse_change(one["measures"][name]), name) for name in names),
        )
        for one in matrix
    )
    columns = (
        Column("student", "student"),
        Column("source", "source"),
        Column("seeds", "seeds"),
        *(Column(name, label(name), decimals(name), signed=True) for name in names),
    )
    table = Table("matrix", "Change of each student, by whose text it was trained on", columns, rows)
    svg = figures.dot_plot(
        "matrix",
        [f"{one['student']} on text of {one['source']}" for one in matrix],
        [to_display_units(parse_estimate(one["measures"][main]["change"]), main) for one in matrix],
        [[display_scale(main) * value for value in one["measures"][main]["seeds"]] for one in matrix],
        label=f"change: {label(main)}",
    )
    html = [figure_html(svg, "Mean over seeds with its 95 % interval (Student's t over seeds); a dot for every seed.")]
    tables = [table]
    found = results["interaction"]
    if found is None:
        html.append(
            note_html(
                "No interaction: it takes at least two lineages of students, each with text of its own kind and of "
                "another. Without it a source that suits a student cannot be told from one that is simply better."
            )
        )
    else:
        contrasts = Table(
            "interaction",
            "Home − away, averaged over students",
            (
                Column("measure", "measure"),
                Column("contrast", "home − away", 3, signed=True),
                Column("seeds", "seeds"),
            ),
            tuple(
                (
                    label(name),
                    to_display_units(parse_estimate(found["measures"][name]["contrast"]), name),
                    len(found["seeds"]),
                )
                for name in found["measures"]
                if is_primary_format(name)
            ),
        )
        tables.append(contrasts)
        html.append(contrasts.to_html())
    return Chapter(
        "Whose text a student can learn from", "\n".join([*html, table.to_html()]), tuple(tables), {"matrix": svg}
    )


def _capability(results: Results) -> Chapter | None:
    cells = results["cells"]
    if not cells[0]["tasks"]:
        return None
    drawn, html, tables = {}, [], []
    for student in results["design"]["students"]:
        of = [one for one in results["effects"] if one["student"] == student]
        tables.append(_eval_panel(student, next(cell for cell in cells if cell["student"] == student)))
        html.append(tables[-1].to_html())
        names = common_measures(of)
        if "accuracy" in names:
            drawn[f"capability_{slug(student)}"] = svg = figures.dot_plot(
                f"capability_{slug(student)}",
                [one["treatment"] for one in of],
                [to_display_units(parse_estimate(one["measures"]["accuracy"]["change"]), "accuracy") for one in of],
                [[100 * value for value in one["measures"]["accuracy"]["seeds"]] for one in of],
                label="change: chance-normalized macro accuracy (points)",
            )
            html.append(figure_html(svg, f"{student}: all treatments, with a dot for every seed."))
        shown = [name for name in names if name == "accuracy" or name.startswith("task/")]
        odds = [name for name in names if name.startswith("log_odds")]
        by_task = (
            ("capability", "accuracy by task", shown),
            ("log_odds", "log-odds of the right choice by task", odds),
        )
        for name, caption, measured in by_task:
            if measured:
                tables.append(effect_table(f"{name}_{slug(student)}", f"{student}: {caption}", of, measured))
                html.append(tables[-1].to_html())
    note = (
        "Chance-normalized means (accuracy − guessing) / (1 − guessing), averaged with equal weight over the tasks "
        "that are eligible: those in which the base, before anything, is above guessing by four standard errors and "
        f"below 95 %. {ONE_SEED_NOTE}"
    )
    return Chapter("Capability by task and arm", "\n".join([*html, note_html(note)]), tuple(tables), drawn)


def _eval_panel(student: str, cell: Mapping[str, Any]) -> Table:
    """What a base can do of each task before anything."""
    columns = (
        Column("task", "task"),
        Column("n", "items"),
        Column("chance", "guessing (%)", 1),
        Column("accuracy", "base (%)", 1),
        Column("chance_normalized", "chance-normalized (%)", 1),
        Column("eligible", "eligible"),
    )
    rows = tuple(
        (
            task["name"],
            task["n"],
            100 * chance,
            100 * base,
            100 * (base - chance) / (1 - chance),
            task["not_eligible"] or "yes",
        )
        for task in cell["tasks"]
        for chance, base in [(task["chance"] or 0.0, task["accuracy"]["before"]["value"])]
    )
    return Table(f"panel_{slug(student)}", f"{student}: the panel before anything", columns, rows)


def _perplexity_table(results: Results) -> Chapter:
    rows = []
    for corpus in results["corpora"].values():
        found, lost = corpus["statistics"], corpus["retokenized"] or {}
        rows.append(
            (
                corpus["label"],
                corpus["samples"],
                corpus["tokens"],
                found["length"]["mean"],
                found["stopped"],
                found["entropy_per_token"],
                found["distinct"]["2"],
                found["duplicates"],
                corpus["contamination"]["found"] if corpus["contamination"]["questions"] else None,
                corpus["contamination"]["questions"],
                lost.get("changed"),
                lost.get("broken_characters"),
                corpus["tokens"] / lost["text_bytes"] if lost.get("text_bytes") else None,
            )
        )
    columns = (
        Column("corpus", "corpus"),
        Column("documents", "documents"),
        Column("tokens", "tokens"),
        Column("length", "mean length", 1),
        Column("stopped", "share ended by a stop id"),
        Column("entropy", "entropy per token (nats)"),
        Column("distinct_2", "distinct-2"),
        Column("duplicates", "duplicates"),
        Column("contaminated", "questions of which 13 words in a row stand in it"),
        Column("questions", "of those with so many words"),
        Column("changed", "documents with other tokens after the way through text"),
        Column("broken", "broken characters dropped"),
        Column("tokens_per_byte", "tokens per byte"),
    )
    table = Table("corpora", "The corpora", columns, tuple(rows))
    return Chapter("What was trained on", table.to_html(), (table,))


def _samples(results: Results) -> Chapter:
    shown = []
    for corpus in results["corpora"].values():
        shown.append(f"<h3>{escape(corpus['label'])}</h3>")
        for sample in corpus["examples"]:
            label = f"document {sample['sample_id']:,} · {sample['tokens']:,} tokens"
            shown.append(
                f'<div class="sample"><p class="label">{label}</p>\n<p class="words">{escape(sample["text"])}</p></div>'
            )
    note = "Chosen by a hash of their numbers, by nobody."
    return Chapter("Samples", note_html(note) + "\n".join(shown))


def _limits() -> Chapter:
    sentences = (
        "<strong>Other recipes.</strong> One learning rate, one budget, the last step; another recipe may turn out "
        "otherwise.",
        "<strong>That nothing changed.</strong> An interval that includes zero is no evidence of absence; preservation "
        "needs a margin declared beforehand (<code>jax-selftrain compare</code>).",
        "<strong>A relation</strong> between a source and a student, unless the interaction is there: one student "
        "cannot tell text that suits it from text that is simply better.",
        "<strong>Forgetting,</strong> unless memorization falls below the control arms at equal damage and "
        "p<sub>z</sub> falls with it.",
        "<strong>The effect of being seen.</strong> The classes are selected by what a source wrote.",
        "<strong>Other models.</strong> Seeds vary corpora and order; the bases are what they are.",
    )
    return Chapter("What this cannot show", "<ul>\n" + "\n".join(f"<li>{one}</li>" for one in sentences) + "\n</ul>")


def _provenance(results: Results) -> Chapter:
    rows = tuple((stage["label"], stage["key"][:16]) for stage in results["stages"])
    table = Table("stages", "Stages and their keys", (Column("stage", "stage"), Column("key", "key")), rows)
    shown = {key: value for key, value in results["config"].items() if key != "models"}
    options = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=100)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    html = f"<pre>{escape(options)}</pre>\n{note_html(versions)}{table.to_html()}"
    return Chapter("How it was made", html, (table,))
