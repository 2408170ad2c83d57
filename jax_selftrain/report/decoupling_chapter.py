"""The key chapter of a study's report: memorization against damage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jax_selftrain.report import figures
from jax_selftrain.report.formatting import label, parse_estimate, slug, to_display_units
from jax_selftrain.report.page import Chapter, figure_html, note_html
from jax_selftrain.report.tables import Column, Table
from jax_selftrain.study.measure_names import common_measures, display_scale, reference_text

Results = Mapping[str, Any]


def decoupling_figure(results: Results) -> Chapter | None:
    names = common_measures(results["cells"])
    texts = [name for name in names if name.startswith("text/")]
    if not texts or "exact_match" not in names:
        return None
    drawn, html = {}, []
    for student in results["design"]["students"]:
        of = [one for one in results["effects"] if one["student"] == student]
        loss = reference_text({name: of[0]["measures"][name]["before"] for name in texts}) or texts[0]
        at = {name: [one["measures"][name] for one in of] for name in (loss, "exact_match", "pz")}
        base = {name: display_scale(name) * parts[0]["before"] for name, parts in at.items()}
        key = f"key_{slug(student)}"
        drawn[key] = figures.damage_panels(
            key,
            [one["treatment"] for one in of],
            [base[loss] + display_scale(loss) * part["change"]["value"] for part in at[loss]],
            [
                (
                    label(name),
                    base[name],
                    [base[name] + display_scale(name) * part["change"]["value"] for part in at[name]],
                )
                for name in ("exact_match", "pz")
            ],
            base[loss],
            x_label=label(loss),
        )
        html.append(
            figure_html(
                drawn[key],
                f"{student}: memorization against loss on {loss.removeprefix('text/')} after every treatment (means "
                f"over seeds); the cross is the base. n = {at['exact_match'][0]['items']:,} sequences.",
            )
        )
        paths = _paths(results, student)
        if paths is not None:
            key = f"trajectories_{slug(student)}"
            drawn[key] = figures.training_trajectories(key, *paths)
            html.append(
                figure_html(
                    drawn[key],
                    f"{student}: the same over training (means over seeds), from before the first step (hollow) to "
                    "after the last.",
                )
            )
    tables = tuple(
        table(results[name])
        for name, table in (
            ("decoupling", _decoupling_table),
            ("fragility", _fragility_table),
            ("aa_repeats", _aa_table),
        )
        if results[name]
    )
    html += [table.to_html() for table in tables]
    note = (
        "A student that lies as low as the controls at its loss has forgotten nothing in particular: weight noise "
        "breaks verbatim paths, too. Forgetting that counts lies below the controls at equal loss, in both panels. "
        "The rule: over five seeds or more, exact match and mean p_z both lie below those of the least damaged arm "
        "of noise whose loss is not below the student's, and mean p_z has fallen (one-sided t, .05 each). Loss is told "
        "on the text that the base predicts best; mean p_z is the share of sequences that one draw says."
    )
    if results["fragility"]:
        note += (
            " Of what the base reproduces, each sequence is also laid beside the base's own greedy continuation of "
            "text that nobody was trained on which was as probable to it (within 0.25 nats of log p_z): such a path is "
            "left by damage alone. Nothing is said where fewer than 50 sequences have such a counterpart."
        )
    return Chapter("Memorization against damage", "\n".join([*html, note_html(note)]), tables, drawn)


def _decoupling_table(result: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        Column("student", "student"),
        Column("treatment", "treatment"),
        Column("verdict", "decoupled?"),
        Column("reason", "because"),
        Column("controls", "beside"),
        Column("exact_match", f"{label('exact_match')} − control's", 2, signed=True),
        Column("pz", f"{label('pz')} − control's", 2, signed=True),
        Column("pz_change", f"change: {label('pz')}", 2, signed=True),
    )
    rows = tuple(
        (
            one["student"],
            one["treatment"],
            one["verdict"],
            one["reason"],
            ", ".join(one["controls"]),
            *(
                None if one[name] is None else to_display_units(parse_estimate(one[name]), measure)
                for name, measure in (("exact_match", "exact_match"), ("pz", "pz"), ("pz_change", "pz"))
            ),
        )
        for one in result
    )
    return Table("decoupling", "Forgotten in particular, or merely damaged?", columns, rows)


def _paths(results: Results, student: str) -> tuple[list[str], list[Any]] | None:
    """What every treatment's evaluations on the way say, averaged over seeds; None where nothing was measured."""
    curves: dict[str, list[Mapping[str, Sequence[float]]]] = {}
    for cell in results["cells"]:
        if cell["student"] == student and cell["training"] and cell["training"]["evaluations"]:
            curves.setdefault(cell["treatment"], []).append(_curve(cell["training"]["evaluations"]))
    if not curves:
        return None
    names = list(next(iter(curves.values()))[0])

    def kind(ending: str) -> list[str]:
        return [name for name in names if name.endswith(f"/{ending}")]

    def path(treatment: str, measures: Sequence[str], scale: float) -> list[float]:
        values = [curve[name] for curve in curves[treatment] for name in measures]
        return [scale * sum(at) / len(at) for at in zip(*values, strict=True)]

    first = curves[next(iter(curves))][0]
    closest = sorted(kind("nll"), key=lambda name: first[name][0])[:1]
    x = [(closest, "loss on text (nats per token)", 1.0), (kind("acc"), "accuracy, mean of tasks (%)", 100.0)]
    y = [(kind("exact_match"), "exact match (%)", 100.0), (kind("pz"), "mean p_z (%)", 100.0)]
    panels = [
        (x_label, y_label, [(path(one, across, a), path(one, up, b)) for one in curves])
        for across, x_label, a in x
        for up, y_label, b in y
        if across and up
    ]
    return (list(curves), panels[:3]) if panels else None


def _fragility_table(found: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        Column("student", "student"),
        Column("treatment", "treatment"),
        Column("kept", "kept of what the base reproduces (%)", 1),
        Column("kept_controls", "kept of continuations as probable (%)", 1),
        Column("difference", "difference (points)", 1, signed=True),
        Column("log_pz", "change of log p_z, difference (nats)", 3, signed=True),
        Column("n", "sequences"),
        Column("unmatched", "without a counterpart"),
        Column("controls", "continuations"),
        Column("seeds", "seeds"),
    )
    rows = tuple(
        (
            one["student"],
            one["treatment"],
            *(
                to_display_units(parse_estimate(one["exact_match"][side]), "exact_match")
                if one["exact_match"]
                else None
                for side in ("sequences", "controls", "difference")
            ),
            parse_estimate(one["log_pz"]["difference"]) if one["log_pz"] else None,
            one["n"],
            one["unmatched"],
            one["controls"],
            one["seeds"],
        )
        for one in found
    )
    return Table("fragility", "What is left of memory beside what is left of paths that are none", columns, rows)


def _aa_table(found: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        Column("student", "base"),
        Column("repeat", "measured again"),
        Column("flips", "exact matches that flip (%)", 2),
        Column("log_pz", "mean |difference| of log p_z (nats)", 6),
        Column("n", "sequences"),
    )
    rows = tuple((one["student"], one["repeat"], 100 * one["flips"], one["log_pz"], one["n"]) for one in found)
    return Table("aa_repeats", "The same model twice: the floor under every change", columns, rows)


def _curve(evaluations: Mapping[str, Any]) -> dict[str, Sequence[float]]:
    """Return the evaluations of a cell by name, with their steps."""
    return {"step": evaluations["step"], **{one["name"]: one["values"] for one in evaluations["measures"]}}
