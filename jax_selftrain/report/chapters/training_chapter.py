"""Chapter on training: loss, learning rate and evaluations by step."""

from __future__ import annotations

from jax_selftrain.report import figures
from jax_selftrain.report.formatting import CURVE_METRICS, Records, Results, make_cell_table
from jax_selftrain.report.page import Chapter
from jax_selftrain.report.tables import Column

LOG_KEYS = ("step", "loss", "learning_rate", "grad_norm")


def write_training(results: Results) -> Chapter | None:
    """Return the chapter; None if nothing was trained."""
    cells = [cell for cell in results["cells"] if cell["training"]]
    if not cells:
        return None
    chapter = Chapter("Training")
    logs = {f"{cell['treatment']}, seed {cell['seed']}, {cell['student']}": cell["training"]["log"] for cell in cells}
    panels = [
        ("optimizer step", title, {name: (log["step"], log[key]) for name, log in logs.items()})
        for key, title in (("loss", "training loss (nats per token)"), ("learning_rate", "learning rate"))
    ]
    chapter.add_figure("training", figures.plot_curves("training", panels), "Each logged step.")
    rows = [
        (cell, row) for cell in cells for row in zip(*(cell["training"]["log"][key] for key in LOG_KEYS), strict=True)
    ]
    heads = [Column(key, digits=6) for key in LOG_KEYS]
    chapter.add_table(make_cell_table("training", "Training log", heads, rows), folded=True)
    chapter.add_note(
        "The loss is that of the step's own batch before the update. Text sampled from a model at temperature 1 "
        "without truncation has an expected gradient of zero at that model, so a flat curve is expected in one epoch."
    )
    _add_evaluations(chapter, [cell for cell in cells if cell["training"]["evaluations"]])
    return chapter


def _add_evaluations(chapter: Chapter, cells: Records) -> None:
    if not cells:
        return
    found = [cell["training"]["evaluations"] for cell in cells]
    steps, measures = found[0]["step"], found[0]["measures"]
    if len(cells) == 1:
        panels = []
        for kind, (title, scale) in CURVE_METRICS.items():
            chosen = [one for one in measures if one["name"].endswith(f"/{kind}")]
            lines = {
                one["name"].rpartition("/")[0]: (steps, [scale * value for value in one["values"]]) for one in chosen
            }
            panels += [("optimizer step", title, lines)] if lines else []
        for i in range(0, len(panels), 3):
            name = f"evaluations_{i // 3}"
            chapter.add_figure(name, figures.plot_curves(name, panels[i : i + 3]), "Evaluations by optimizer step.")
    heads = [Column("step"), *(Column(one["name"], one["name"], 4) for one in measures)]
    rows = [
        (cell, row)
        for cell, evaluations in zip(cells, found, strict=True)
        for row in zip(evaluations["step"], *(one["values"] for one in evaluations["measures"]), strict=True)
    ]
    chapter.add_table(make_cell_table("evaluations", "Evaluations during training", heads, rows), folded=len(cells) > 1)
    sizes = "; ".join(f"{one['name']}: n = {one['n']:,}" for one in measures)
    chapter.add_note(
        f"{sizes}. All points of a curve use the same documents and sequences. acc, exact_match and pz are "
        "proportions, nll is in nats per token, log_pz in nats per suffix."
    )
