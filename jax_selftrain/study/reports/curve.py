"""The chapter on what was measured while the student was trained: capability against memorisation, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jax_selftrain.study.reports import figures
from jax_selftrain.study.reports.page import Chapter, framed, remark
from jax_selftrain.study.reports.tables import Column, Table

KINDS = {
    "nll": ("texts", "nats per token", 1),
    "acc": ("tasks", "accuracy (%)", 100),
    "exact_match": ("sequences", "exact match (%)", 100),
    "log_pz": ("sequences", "log p_z (nats)", 1),
    "pz": ("sequences", "mean p_z (%)", 100),
}
"""By the last part of a measure's name: what it is measured on, the label of its axis, the scale there."""


def summarise_curve(
    curve: Sequence[Mapping[str, float]], measured: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The part of `results.json` that this chapter is made from; None where nothing was measured on the way.

    Args:
      curve: the lines of `curve.jsonl`.
      measured: what stands under `evaluation.measured` in `run.json`.

    Returns:
      `step`, and `measures`: each with `name`, `n` (documents, questions or sequences) and `values`, one per step.
    """
    if not curve:
        return None
    sizes = {
        f"{name}/{kind}": entry["n"]
        for files in measured
        for kind, (part, _, _) in KINDS.items()
        for name, entry in files.get(part, {}).items()
    }
    names = [name for name in curve[0] if name != "step"]
    return {
        "step": [line["step"] for line in curve],
        "measures": [{"name": name, "n": sizes[name], "values": [line[name] for line in curve]} for name in names],
    }


def curve_chapter(results: Mapping[str, Any]) -> Chapter | None:
    """The chapter, if there is anything to say."""
    found = results.get("evaluations")
    if found is None:
        return None
    steps, measures = found["step"], found["measures"]
    stopped = results["training"].get("early_stopping")
    best = steps.index(stopped["best_step"]) if stopped else None
    of_kind = {kind: [one for one in measures if _kind(one) == kind] for kind in KINDS}
    drawn, html = {}, []
    counted = "; ".join(f"{one['name']}: n = {one['n']:,}" for one in measures)
    both = bool(of_kind["nll"] and of_kind["exact_match"])
    if both:
        (exact,), (probability,) = of_kind["exact_match"], of_kind["log_pz"]
        drawn["capability_memorisation"] = figures.paths(
            "capability_memorisation",
            steps,
            [(_file(text), text["values"]) for text in of_kind["nll"]],
            [(KINDS[_kind(one)][1], _scaled(one)) for one in (exact, probability)],
            x_label="loss on text (nats per token)",
            best=best,
        )
        caption = "One point per evaluation, from before the first step (hollow) to after the last (filled). "
        caption += "Ringed: the step whose model was delivered. " if stopped else ""
        html.append(framed(drawn["capability_memorisation"], caption + counted + "."))
    drawn["evaluations"] = figures.curves(
        "evaluations",
        steps,
        [
            (KINDS[kind][1], [(_file(one), _scaled(one)) for one in of])
            for kind, of in of_kind.items()
            if of and kind != "pz"
        ],
        best=best,
    )
    html.append(framed(drawn["evaluations"], f"Each evaluation, by optimiser step. {counted}."))
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
    title = "Capability against memorisation over training" if both else "Over training"
    return Chapter(title, "".join(html) + table.to_html() + remark(note), (table,), drawn)


def _kind(measure: Mapping[str, Any]) -> str:
    return measure["name"].rpartition("/")[2]


def _file(measure: Mapping[str, Any]) -> str:
    return measure["name"].rpartition("/")[0]


def _scaled(measure: Mapping[str, Any]) -> list[float]:
    scale = KINDS[_kind(measure)][2]
    return [scale * value for value in measure["values"]]
