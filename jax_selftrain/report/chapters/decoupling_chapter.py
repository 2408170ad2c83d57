"""Chapter on memorization against damage: the main figure of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax_selftrain.report import figures
from jax_selftrain.report import formatting as fmt
from jax_selftrain.report.formatting import Records, Results
from jax_selftrain.report.page import Chapter
from jax_selftrain.report.tables import Column, Table, make_columns
from jax_selftrain.study.measure_names import common_measures, display_scale, reference_text


def write_decoupling(results: Results) -> Chapter | None:
    """Return the chapter; None without texts, sequences or comparisons."""
    names = common_measures(results["cells"])
    if "exact_match" not in names or not any(name.startswith("text/") for name in names):
        return None
    chapter = Chapter("Memorization against damage")
    for student in results["design"]["students"]:
        effects = fmt.select_student(results["effects"], student)
        if len(effects) > 1:
            _add_damage(chapter, student, effects)
        _add_trajectories(chapter, student, fmt.select_student(results["cells"], student))
    if not chapter.figures:
        return None
    makers = {"decoupling": _make_decoupling_table, "fragility": _make_fragility_table, "aa_repeats": _make_aa_table}
    for name, make in makers.items():
        if results[name]:
            chapter.add_table(make(results[name]))
    chapter.add_note(
        "Weight noise also breaks verbatim continuations, so a fall of exact match counts as forgetting only below "
        "the noise controls at equal loss. The rule: over five seeds or more, exact match and mean p_z are below "
        "those of the least damaged noise arm whose loss is not below the student's, and mean p_z has fallen "
        "(one-sided t-tests at .05). The loss is that of the text with the lowest loss under the base. p_z is the "
        "probability that one sample is the suffix. In the fragility table each sequence is matched with a "
        "continuation by the base of text outside all training data, within 0.25 nats of log p_z; fewer than 50 "
        "matched sequences give no result."
    )
    return chapter


def _add_damage(chapter: Chapter, student: str, effects: Records) -> None:
    measures = effects[0]["measures"]
    base = {name: entry["before"] for name, entry in measures.items()}
    loss = reference_text(base) or ""
    levels = {
        one["treatment"]: {name: entry["before"] + entry["change"]["value"] for name, entry in one["measures"].items()}
        for one in effects
    } | {"base": base}
    panels = [
        (
            fmt.format_measure(loss),
            fmt.format_measure(name),
            {
                label: ([display_scale(loss) * at[loss]], [display_scale(name) * at[name]])
                for label, at in levels.items()
            },
        )
        for name in ("exact_match", "pz")
    ]
    name = f"damage_{fmt.slugify(student)}"
    chapter.add_figure(
        name,
        figures.plot_damage(name, panels),
        f"{student}: memorization against loss on {loss.removeprefix('text/')} after each treatment (means over "
        f"seeds); the cross is the base. n = {measures['exact_match']['items']:,} sequences.",
    )


def _add_trajectories(chapter: Chapter, student: str, cells: Records) -> None:
    """Plot evaluations during training, averaged over seeds."""
    curves: dict[str, list[Mapping[str, Sequence[float]]]] = {}
    for cell in cells:
        if cell["training"] and (found := cell["training"]["evaluations"]):
            curves.setdefault(cell["treatment"], []).append({one["name"]: one["values"] for one in found["measures"]})
    if not curves:
        return
    first = next(iter(curves.values()))[0]

    def select(kind: str) -> list[str]:
        return [name for name in first if name.endswith(f"/{kind}")]

    def average(treatment: str, names: Sequence[str], scale: float) -> list[float]:
        values = [curve[name] for curve in curves[treatment] for name in names]
        return [scale * sum(at) / len(at) for at in zip(*values, strict=True)]

    reference = sorted(select("nll"), key=lambda name: first[name][0])[:1]
    panels = []
    for across, kind in ((reference, "nll"), (select("acc"), "acc")):
        for up in ("exact_match", "pz"):
            if across and select(up):
                (x_label, a), (y_label, b) = fmt.CURVE_METRICS[kind], fmt.CURVE_METRICS[up]
                lines = {one: (average(one, across, a), average(one, select(up), b)) for one in curves}
                panels.append((x_label, y_label, lines))
    if panels:
        name = f"trajectories_{fmt.slugify(student)}"
        svg = figures.plot_trajectories(name, panels[:3])
        caption = (
            f"{student}: training trajectories (means over seeds), from before the first step (hollow) to the end."
        )
        chapter.add_figure(name, svg, caption)


def _make_decoupling_table(found: Records) -> Table:
    keys = {"exact_match": "exact_match", "pz": "pz", "pz_change": "pz"}
    heads = [
        *make_columns("student", "treatment", "verdict", "reason", "controls"),
        Column("exact_match", f"{fmt.format_measure('exact_match')} − control", 2, signed=True),
        Column("pz", f"{fmt.format_measure('pz')} − control", 2, signed=True),
        Column("pz_change", f"change: {fmt.format_measure('pz')}", 2, signed=True),
    ]
    rows = [
        (
            *fmt.pick(one, "student", "treatment", "verdict", "reason"),
            ", ".join(one["controls"]),
            *(one[key] and fmt.parse_displayed(one[key], measure) for key, measure in keys.items()),
        )
        for one in found
    ]
    return Table("decoupling", "Selective forgetting or general damage", heads, rows)


def _make_fragility_table(found: Records) -> Table:
    heads = [
        *make_columns("student", "treatment"),
        Column("kept", "kept of the sequences that the base reproduces (%)", 1),
        Column("kept_controls", "kept of the matched controls (%)", 1),
        Column("difference", "difference (points)", 1, signed=True),
        Column("log_pz", "change of log p_z, difference (nats)", signed=True),
        *make_columns("n", "unmatched", "controls", "seeds"),
    ]
    rows = [
        (
            *fmt.pick(one, "student", "treatment"),
            *(
                fmt.parse_displayed(one["exact_match"][side], "exact_match") if one["exact_match"] else None
                for side in ("sequences", "controls", "difference")
            ),
            fmt.parse_estimate(one["log_pz"]["difference"]) if one["log_pz"] else None,
            *fmt.pick(one, "n", "unmatched", "controls", "seeds"),
        )
        for one in found
    ]
    return Table("fragility", "Memorized sequences and matched controls", heads, rows)


def _make_aa_table(found: Records) -> Table:
    heads = [
        *make_columns("student", "repeat"),
        Column("flips", "exact matches that flip (%)", 2, 100),
        Column("log_pz", "mean |difference| of log p_z (nats)", 6),
        Column("n", "sequences"),
    ]
    rows = [fmt.pick(one, "student", "repeat", "flips", "log_pz", "n") for one in found]
    return Table("aa_repeats", "A/A repeats: the same base measured twice", heads, rows)
