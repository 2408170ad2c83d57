"""Chapters on training, the training corpora and samples from them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from jax_selftrain.report import figures
from jax_selftrain.report.formatting import CURVE_METRICS, Records, Results, make_cell_table
from jax_selftrain.report.page import Chapter
from jax_selftrain.report.tables import Column, Record, Table, format_number

LOG_KEYS = ("step", "loss", "learning_rate", "grad_norm")


def write_training(results: Results) -> Chapter | None:
    """Return the chapter on training; None if nothing was trained."""
    cells = [cell for cell in results["cells"] if cell["training"]]
    if not cells:
        return None
    chapter = Chapter("Training")
    logs = {f"{cell['treatment']}, seed {cell['seed']}, {cell['student']}": cell["training"]["log"] for cell in cells}
    panels = [
        ("optimizer step", title, {name: (log["step"], log[key]) for name, log in logs.items()})
        for key, title in (("loss", "training loss (nats per token)"), ("learning_rate", "learning rate"))
    ]
    chapter.add_figure(figures.plot_panels("training", panels, figures.draw_curves), "Each logged step.")
    records = [(cell, record) for cell in cells for record in _list_steps(cell["training"]["log"], LOG_KEYS)]
    columns = [Column(key, digits=6) for key in LOG_KEYS]
    chapter.add_table(make_cell_table("training", "Training log", columns, records), folded=True)
    chapter.add_note(
        "The loss is that of the step's own batch before the update. Text sampled from a model at temperature 1 "
        "without truncation has an expected gradient of zero at that model, so a flat curve is expected in one epoch."
    )
    _add_evaluations(chapter, [cell for cell in cells if cell["training"]["evaluations"]])
    return chapter


def _list_steps(series: Record, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Return a record for each step of some series."""
    return [dict(zip(keys, values, strict=True)) for values in zip(*(series[key] for key in keys), strict=True)]


def _add_evaluations(chapter: Chapter, cells: Records) -> None:
    if not cells:
        return
    first = cells[0]["training"]["evaluations"]
    names = [one["name"] for one in first["measures"]]
    curves = [
        {"step": found["step"], **{one["name"]: one["values"] for one in found["measures"]}}
        for found in (cell["training"]["evaluations"] for cell in cells)
    ]
    if len(cells) == 1:
        panels = []
        for kind, (title, scale) in CURVE_METRICS.items():
            lines = {
                name.rpartition("/")[0]: (first["step"], [scale * value for value in curves[0][name]])
                for name in names
                if name.endswith(f"/{kind}")
            }
            panels += [("optimizer step", title, lines)] if lines else []
        for i in range(0, len(panels), 3):
            figure = figures.plot_panels(f"evaluations_{i // 3}", panels[i : i + 3], figures.draw_curves)
            chapter.add_figure(figure, "Evaluations by optimizer step.")
    columns = [Column("step"), *(Column(name, name, 4) for name in names)]
    records = [
        (cell, record)
        for cell, curve in zip(cells, curves, strict=True)
        for record in _list_steps(curve, ["step", *names])
    ]
    table = make_cell_table("evaluations", "Evaluations during training", columns, records)
    chapter.add_table(table, folded=len(cells) > 1)
    sizes = "; ".join(f"{one['name']}: n = {one['n']:,}" for one in first["measures"])
    chapter.add_note(
        f"{sizes}. All points of a curve use the same documents and sequences. acc, exact_match and pz are "
        "proportions, nll is in nats per token, log_pz in nats per suffix."
    )


def write_corpora(results: Results) -> Chapter:
    """Return the chapter on the statistics of the corpora."""
    chapter = Chapter("Training corpora")
    columns = [
        *(Column("corpus", path=("label",)), Column("documents", path=("samples",)), Column("tokens")),
        *(Column(f"length_{key}", f"length, {key}", 1, path=("length", key)) for key in ("mean", "median", "max")),
        Column("stopped", "ended by a stop token"),
        Column("nll", "−log p per token (nats)", path=("nll_per_token",)),
        Column("entropy", "entropy per token (nats)", path=("entropy_per_token",)),
        *(Column(f"distinct_{n}", f"distinct-{n}", path=("distinct", str(n))) for n in (1, 2, 3, 4)),
        Column("duplicates"),
        Column("contaminated", "questions with a 13-gram in the corpus"),
        Column("questions", "questions of at least 13 words"),
        Column("changed", "documents that retokenize differently"),
        Column("broken", "broken characters dropped"),
        Column("tokens_per_byte"),
    ]
    records = [_make_corpus_record(corpus) for corpus in results["corpora"].values()]
    chapter.add_table(Table("corpora", "Training corpora", columns, records))
    chapter.add_note(
        "Lengths count the stop token but not the BOS token. −log p is under the source at temperature 1. The "
        "entropy is that of the sampling distribution. Duplicates and documents that a stop token ended are "
        "proportions."
    )
    return chapter


def _make_corpus_record(corpus: Record) -> Record:
    changes, overlap = corpus["retokenized"] or {}, corpus["contamination"]
    text_bytes = changes.get("text_bytes")
    return {
        **corpus["statistics"],
        **corpus,
        "contaminated": overlap["found"] if overlap["questions"] else None,
        "questions": overlap["questions"],
        "changed": changes.get("changed", corpus["retokenization_mismatches"]),
        "broken": changes.get("broken_characters"),
        "tokens_per_byte": corpus["tokens"] / text_bytes if text_bytes else None,
    }


def write_samples(results: Results) -> Chapter:
    """Return the chapter on random samples."""
    chapter = Chapter("Random samples")
    chapter.add_note("Chosen by a hash of the seed and the sample ids.")
    for corpus in results["corpora"].values():
        chapter.html.append(f"<h3>{escape(corpus['label'])}</h3>")
        chapter.html += [
            f'<div class="sample"><p class="label">{_describe_sample(sample)}</p>\n'
            f'<p class="words">{escape(sample["text"]) or "<em>(no text)</em>"}</p></div>'
            for sample in corpus["examples"]
        ]
    return chapter


def _describe_sample(sample: Record) -> str:
    parts = [f"sample {sample['sample_id']:,}", f"{sample['tokens']:,} tokens"]
    if sample["finish_reason"]:
        parts.append("ended by a stop token" if sample["finish_reason"] == "stop" else "cut at the length limit")
    if sample["logprob"] is not None and sample["tokens"]:
        parts.append(f"{format_number(-sample['logprob'] / sample['tokens'])} nats per token")
    return " · ".join(parts)
