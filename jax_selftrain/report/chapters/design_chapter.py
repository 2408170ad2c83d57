"""Chapter on the models of a study and their training budgets."""

from __future__ import annotations

from jax_selftrain.report.formatting import Results, pick
from jax_selftrain.report.page import Chapter
from jax_selftrain.report.tables import Table, make_columns

AXES = ("lineage", "data", "data_order", "initialization", "tokenizer", "architecture", "size")
SIZES = ("family", "parameters", "layers", "width", "vocabulary")


def write_design(results: Results) -> Chapter:
    """Return the chapter."""
    chapter = Chapter("Design")
    chapter.add_table(_make_model_table(results))
    chapter.add_table(_make_budget_table(results))
    chapter.add_note(
        "Ability before training: accuracy on tasks, bits per byte on texts. Steps, batch and learning rate are the "
        "same in all cells except where an arm sets them. The numbers of tokens differ because documents fill rows "
        "differently."
    )
    return chapter


def _make_model_table(results: Results) -> Table:
    ability, design = results["base_ability"], results["design"]
    measured = list(dict.fromkeys(name for scores in ability.values() for name in scores))
    axes = [axis for axis in AXES if any(model[axis] for model in design["models"])]
    roles = {"source": design["sources"], "student": design["students"]}
    rows = [
        (
            model["name"],
            " and ".join(role for role, names in roles.items() if model["name"] in names),
            *(model[axis] or "not given" for axis in axes),
            *pick(model, *SIZES),
            *(ability.get(model["name"], {}).get(name) for name in measured),
        )
        for model in design["models"]
    ]
    heads = make_columns("model", "role", *axes, *SIZES, *measured)
    return Table("models", "Models and their ability before training", heads, rows)


def _make_budget_table(results: Results) -> Table:
    rows = []
    for effect in results["effects"]:
        key = pick(effect, "student", "treatment")
        cells = [cell for cell in results["cells"] if pick(cell, "student", "treatment") == key]
        trained = [cell["training"] for cell in cells if cell["training"]]
        corpora = [results["corpora"][cell["corpus"]] for cell in cells if cell["corpus"]]
        values = [
            *([part[name] for part in trained if part[name] is not None] for name in ("steps", "rows", "targets")),
            *([part[name] for part in corpora] for name in ("samples", "tokens")),
        ]
        rows.append((*key, len(cells), *(round(sum(one) / len(one)) if one else None for one in values)))
    heads = make_columns(
        "student", "treatment", "seeds", "steps", "rows", "target_tokens", "corpus_documents", "corpus_tokens"
    )
    return Table("budget", "Training budgets, means over seeds", heads, rows)
