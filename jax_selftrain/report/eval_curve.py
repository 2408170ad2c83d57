"""The chapter on what was measured while the student was trained: capability against memorization, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_selftrain.report import figures
from jax_selftrain.report.page import Chapter, figure_html, note_html
from jax_selftrain.report.tables import Column, Table
from jax_selftrain.study.curve_summary import METRIC_KINDS


def curve_chapter(results: Mapping[str, Any]) -> Chapter | None:
    """The chapter, if there is anything to say."""
    found = results.get("evaluations")
    if found is None:
        return None
    steps, measures = found["step"], found["measures"]
    stopped = results["training"].get("early_stopping")
    best = steps.index(stopped["best_step"]) if stopped else None
    of_kind = {kind: [one for one in measures if _kind(one) == kind] for kind in METRIC_KINDS}
    drawn, html = {}, []
    counted = "; ".join(f"{one['name']}: n = {one['n']:,}" for one in measures)
    both = bool(of_kind["nll"] and of_kind["exact_match"])
    if both:
        (exact,), (probability,) = of_kind["exact_match"], of_kind["log_pz"]
        drawn["capability_memorization"] = figures.loss_vs_memorization(
            "capability_memorization",
            steps,
            [(_file(text), text["values"]) for text in of_kind["nll"]],
            [(METRIC_KINDS[_kind(one)][1], _scaled(one)) for one in (exact, probability)],
            x_label="loss on text (nats per token)",
            best=best,
        )
        caption = "One point per evaluation, from before the first step (hollow) to after the last (filled). "
        caption += "Ringed: the step whose model was delivered. " if stopped else ""
        html.append(figure_html(drawn["capability_memorization"], caption + counted + "."))
    drawn["evaluations"] = figures.curves(
        "evaluations",
        steps,
        [
            (METRIC_KINDS[kind][1], [(_file(one), _scaled(one)) for one in of])
            for kind, of in of_kind.items()
            if of and kind != "pz"
        ],
        best=best,
    )
    html.append(figure_html(drawn["evaluations"], f"Each evaluation, by optimizer step. {counted}."))
    columns = (Column("step", "step"), *(Column(one["name"], one["name"], 4) for one in measures))
    rows = zip(steps, *(one["values"] for one in measures), strict=True)
    table = Table("evaluations", "Measured on the way", columns, tuple(rows))
    note = (
        "Points of one curve are measured on the same documents and sequences, so that their differences are surer "
        "than the numbers themselves; the intervals of the whole change stand in the chapters above. exact_match "
        "and acc are shares of 1, pz is the mean probability of a suffix; nll is in nats per token, log_pz in nats per "
        "suffix."
    )
    if stopped:
        note += (
            f" The model delivered was chosen by {stopped['metric']}: what is measured on that very file flatters it."
        )
    title = "Capability against memorization over training" if both else "Over training"
    return Chapter(title, "".join(html) + table.to_html() + note_html(note), (table,), drawn)


def _kind(measure: Mapping[str, Any]) -> str:
    return measure["name"].rpartition("/")[2]


def _file(measure: Mapping[str, Any]) -> str:
    return measure["name"].rpartition("/")[0]


def _scaled(measure: Mapping[str, Any]) -> list[float]:
    scale = METRIC_KINDS[_kind(measure)][2]
    return [scale * value for value in measure["values"]]
