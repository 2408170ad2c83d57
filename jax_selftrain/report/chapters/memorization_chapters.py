"""Chapters on verbatim memorization, against damage and by kind of sequence."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax_selftrain.report import figures
from jax_selftrain.report import formatting as fmt
from jax_selftrain.report.formatting import Chapter, Column, Record, Records, Results, Table, make_columns
from jax_selftrain.stats import estimators
from jax_selftrain.study import measure_names
from jax_selftrain.study.measure_names import (
    AFTER_RELEARNING,
    AFTER_RELEARNING_H,
    EMITTED,
    HELD_OUT,
    NOT_SHOWN,
    REPRODUCED,
    common_measures,
    display_scale,
    is_secondary,
)

CLASSES = {
    "all": "all sequences",
    "held_out": "held-out",
    "partial": "partial",
    "seen": "seen",
    HELD_OUT: "H",
    EMITTED: "H, emitted",
    REPRODUCED: "held-out, reproduced by the base",
    NOT_SHOWN: "H, not shown in relearning",
}
MEASURES: dict[str, tuple[str, int, float]] = {
    "exact_match": ("exact match (%)", 1, 100),
    "token_accuracy": ("greedy token accuracy (%)", 1, 100),
    "logprob": ("mean log p_z (nats)", 2, 1),
    "pz": ("mean p_z (%)", 1, 100),
}
"""Heading, decimals and scale."""


def _make_kept_column(key: str, title: str, part: str) -> Column:
    path = ("exact_match", part)
    return Column(key, title, 1, signed=key == "difference", path=path, measure="exact_match")


DECOUPLING_TABLES: dict[str, tuple[str, list[Column]]] = {
    "decoupling": (
        "Selective forgetting or general damage",
        [
            *make_columns("student", "treatment", "verdict", "reason", "controls"),
            Column("accuracy", "change: accuracy (points)", 2, signed=True, measure="accuracy"),
            Column("exact_match", "held-out exact match (points) − control", 2, signed=True, measure="exact_match"),
            Column("pz", "held-out mean p_z (points) − control", 2, signed=True, measure="pz"),
            Column("pz_change", "change: held-out mean p_z (points)", 2, signed=True, measure="pz"),
        ],
    ),
    "fragility": (
        "Memorized sequences and matched controls",
        [
            *make_columns("student", "treatment"),
            _make_kept_column("kept", "kept of the sequences that the base reproduces (%)", "sequences"),
            _make_kept_column("kept_controls", "kept of the matched controls (%)", "controls"),
            _make_kept_column("difference", "difference (points)", "difference"),
            Column("log_pz", "change of log p_z, difference (nats)", signed=True, path=("log_pz", "difference")),
            *make_columns("n", "unmatched", "controls", "loops", "seeds"),
        ],
    ),
    "aa_repeats": (
        "A/A repeats: the same base measured twice",
        [
            *make_columns("student", "repeat"),
            Column("flips", "exact matches that flip (%)", 2, 100),
            Column("log_pz", "mean |difference| of log p_z (nats)", 6),
            Column("n", "sequences"),
        ],
    ),
}
MEMORIZATION_TABLES: dict[str, tuple[str, list[Column]]] = {
    "decontamination": (
        "Decontaminated corpus and size-matched control",
        [
            *make_columns("student", "decontaminated", "size_matched"),
            Column("measure", convert=fmt.format_measure),
            Column("difference", "decontaminated − size-matched", 4, signed=True, measure="*"),
            *make_columns("n", "seeds"),
        ],
    ),
    "swap_effects": (
        "Effect of seen sequences, by swapped corpora",
        [
            *make_columns("student", "treatment"),
            Column("measure", convert=fmt.format_measure),
            Column("effect", "effect of the corpus containing a sequence", signed=True, measure="*"),
            Column("naive", "seen − held-out", signed=True, measure="*"),
            Column("n", path=("effect", "n")),
            Column("seeds"),
        ],
    ),
}
"""Caption and columns of tables, by their name in `results.json`."""


def write_decoupling(results: Results) -> Chapter | None:
    """Return the chapter; None without texts, sequences or comparisons."""
    names = common_measures(results["cells"])
    if "exact_match" not in names or not any(name.startswith("text/") for name in names):
        return None
    chapter = Chapter("Memorization against damage")
    for student in results["design"]["students"]:
        effects, cells = ([o for o in results[key] if o["student"] == student] for key in ("effects", "cells"))
        loss = f"text/{results['damage_texts'][student]}"
        if len(effects) > 1 and loss in effects[0]["measures"]:
            _add_damage(chapter, results, effects, loss)
        _add_trajectories(chapter, results, cells)
    if not chapter.figures:
        return None
    for name, (caption, columns) in DECOUPLING_TABLES.items():
        chapter.add_table(Table(name, caption, columns, results[name]))
    chapter.add_note(fmt.NOTES["decoupling"])
    return chapter


def _add_damage(chapter: Chapter, results: Results, effects: Records, loss: str) -> None:
    student, treatments = effects[0]["student"], fmt.list_treatments(results)
    measures = effects[0]["measures"]
    base = {name: entry["before"] for name, entry in measures.items()}
    levels = {
        one["treatment"]: {name: entry["before"] + entry["change"]["value"] for name, entry in one["measures"].items()}
        for one in effects
    } | {"base": base}

    def select(name: str, at: Mapping[str, float]) -> list[float]:
        return [display_scale(name) * at[name]]

    panels = []
    for name in ("exact_match", "pz"):
        lines = {label: (select(loss, at), select(name, at)) for label, at in levels.items()}
        panels.append((fmt.format_measure(loss), fmt.format_measure(name), lines))
    chapter.add_figure(
        figures.plot_panels(f"damage_{fmt.slugify(student)}", panels, figures.draw_damage, treatments),
        f"{student}: memorization against loss on {loss.removeprefix('text/')} after each treatment (means over "
        f"seeds); the cross is the base. n = {measures['exact_match']['items']:,} sequences.",
    )


def _add_trajectories(chapter: Chapter, results: Results, cells: Records) -> None:
    """Plot evaluations during training, averaged over seeds."""
    curves: dict[str, list[Mapping[str, Sequence[float]]]] = {}
    student, treatments = cells[0]["student"], fmt.list_treatments(results)
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
        return [scale * value for value in fmt.average_curves(values)]

    reference = sorted(select("nll"), key=lambda name: first[name][0])[:1]
    panels = []
    for across, kind in ((reference, "nll"), (select("acc"), "acc")):
        for up in ("exact_match", "pz"):
            if across and select(up):
                (x_label, a), (y_label, b) = fmt.CURVE_METRICS[kind], fmt.CURVE_METRICS[up]
                lines = {one: (average(one, across, a), average(one, select(up), b)) for one in curves}
                panels.append((x_label, y_label, lines))
    if panels:
        chapter.add_figure(
            figures.plot_panels(
                f"trajectories_{fmt.slugify(student)}", panels[:3], figures.draw_trajectories, treatments
            ),
            f"{student}: training trajectories (means over seeds), from before the first step (hollow) to the end.",
        )


def write_memorization(results: Results) -> Chapter | None:
    """Return the chapter; None without an extraction set."""
    cells = results["cells"]
    if not cells[0]["extraction"]:
        return None
    chapter, first, several = Chapter("Verbatim memorization"), cells[0]["extraction"], len(cells) > 1
    chapter.html.append(fmt.NOTES["exact_match"].format_map(first))
    for student in results["design"]["students"]:
        if several:
            _add_effects(chapter, student, [one for one in results["effects"] if one["student"] == student])
        _add_relearning(chapter, results, [one for one in results["effects"] if one["student"] == student])
        _add_discoverability(chapter, results, [cell for cell in cells if cell["student"] == student])
    if not several:
        parts = {name: part["exact_match"] for name, part in _list_parts(first) if part["n"]}
        figure = figures.plot_before_and_after("extraction", parts, "exact_match", "exact match (%)")
        chapter.add_figure(figure, "Exact match before and after, and the paired change, with 95 % intervals.")
        chapter.add_table(_make_discoverability_table(first), folded=True)
    chapter.add_table(_make_sequence_table(cells), folded=several)
    chapter.add_table(_make_threshold_table(cells))
    for name, (caption, columns) in MEMORIZATION_TABLES.items():
        chapter.add_table(Table(name, caption, columns, results[name]))
    chapter.add_note(fmt.NOTES["memorization"].format_map(first))
    return chapter


def _add_effects(chapter: Chapter, student: str, effects: Records) -> None:
    from_source = [one for one in effects if one["source"]] or effects  # other arms have no overlap classes
    measures = [name for name in common_measures(from_source) if name.startswith(("exact_match", "log_pz", "pz"))]
    formats = fmt.natural_sort(filter(is_secondary, measures))
    others = fmt.natural_sort(measure for measure in measures if not is_secondary(measure))
    fmt.add_effect_table(chapter, "memorization", student, "memorization", effects, others)
    fmt.add_effect_table(chapter, "formats", student, "other prompt formats, and after relearning", effects, formats)


def _add_relearning(chapter: Chapter, results: Results, effects: Records) -> None:
    """Plot exact match by the number of relearning steps, averaged over seeds."""
    student, panels = effects[0]["student"], []
    for name, start, title in (
        (AFTER_RELEARNING, "exact_match", "unrelated text"),
        (AFTER_RELEARNING_H, f"exact_match/{NOT_SHOWN}", "the other half of H"),
    ):
        prefix = f"exact_match/{name} "
        steps = sorted(int(one.removeprefix(prefix)) for one in common_measures(effects) if one.startswith(prefix))
        if not steps:
            continue
        measures = {0: start, **{count: f"{prefix}{count}" for count in steps}}
        lines = {"base": ([*measures], [100 * effects[0]["measures"][one]["before"] for one in measures.values()])}
        for effect in effects:
            entries = [effect["measures"][one] for one in measures.values()]
            levels = [100 * (entry["before"] + entry["change"]["value"]) for entry in entries]
            lines[effect["treatment"]] = ([*measures], levels)
        panels.append((f"steps on {title}", "exact match (%)", lines))
    if panels:
        chapter.add_figure(
            figures.plot_panels(
                f"relearning_{fmt.slugify(student)}", panels, figures.draw_trajectories, fmt.list_treatments(results)
            ),
            f"{student}: exact match after short trainings (means over seeds), from before them (hollow). Text that "
            "returns without being shown was not forgotten. The base is trained in the same way.",
        )


def _list_parts(extraction: Record) -> list[tuple[str, Record]]:
    """Return (name, part) of all sequences and of each class and group."""
    classes = [(name, extraction["classes"][key]) for key, name in CLASSES.items() if key in extraction["classes"]]
    return classes + [(f"group {part['name']}", part) for part in extraction["groups"]]


def _add_discoverability(chapter: Chapter, results: Results, cells: Records) -> None:
    """Plot (n, p)-discoverable extraction, means over seeds."""

    def average(members: Records, p: float, side: str) -> tuple[list[int], list[float]]:
        curves = [[e for e in cell["extraction"]["discoverable"] if e["p"] == p] for cell in members]
        values = [[100 * entry[side]["value"] for entry in curve] for curve in curves]
        return [entry["draws"] for entry in curves[0]], [sum(at) / len(at) for at in zip(*values, strict=True)]

    student, panels = cells[0]["student"], []
    for p in dict.fromkeys(entry["p"] for entry in cells[0]["extraction"]["discoverable"]):
        lines = {"before": average(cells[:1], p, "before")}
        for (_, treatment), members in measure_names.group_cells(cells).items():
            lines[treatment] = average(members, p, "after")
        panels.append((f"samples n, p ≥ {p:g}", "% of sequences", lines))
    chapter.add_figure(
        figures.plot_panels(
            f"discoverability_{fmt.slugify(student)}",
            panels,
            figures.draw_discoverability,
            fmt.list_treatments(results),
        ),
        f"{student}: (n, p)-discoverable extraction, the share of {cells[0]['extraction']['n']:,} sequences that n "
        "samples at temperature 1 contain with probability p or more (means over seeds).",
    )


def _make_discoverability_table(extraction: Record) -> Table:
    columns = [
        Column("samples", "samples n", path=("draws",)),
        Column("p", "p", 1),
        Column("sequences", path=("before", "n")),
        *fmt.make_side_columns("extracted", "extracted (%)", path=()),
    ]
    records = extraction["discoverable"]
    return Table("discoverability", "(n, p)-discoverable extraction: 1 − (1 − p_z)ⁿ ≥ p", columns, records)


def _make_sequence_table(cells: Records) -> Table:
    measures = [name for name in MEASURES if name in cells[0]["extraction"]["classes"]["all"]]
    flips = {"kept": "kept", "lost": "lost", "gained": "gained", "neither": "both_wrong"}
    columns = [
        *make_columns("sequences", "n"),
        *(Column(key, path=("flips", field)) for key, field in flips.items()),
        Column("mcnemar_p", "McNemar p", p_value=True, path=("flips", "mcnemar_p")),
        *(column for name in measures for column in fmt.make_side_columns(name, *MEASURES[name])),
    ]
    records = [(cell, {"sequences": name, **part}) for cell in cells for name, part in _list_parts(cell["extraction"])]
    return fmt.make_cell_table("extraction", "Sequences before and after, by overlap class and group", columns, records)


def _make_threshold_table(cells: Records) -> Table:
    """Return mean changes by overlap class for several lengths of overlap."""
    measures = {"log_pz": "logprob", "exact_match": "exact_match"}
    found: dict[tuple[Any, ...], list[Record]] = {}
    for cell in cells:
        for part in cell["extraction"].get("thresholds", ()):
            if part["n"]:
                key = cell["student"], cell["treatment"], part["threshold"], part["class"].replace("_", "-")
                found.setdefault(key, []).append(part)
    keys = ("student", "treatment", "threshold", "class")
    records = [
        {
            **dict(zip(keys, key, strict=True)),
            "seeds": len(parts),
            "n": round(sum(part["n"] for part in parts) / len(parts)),
            **{name: _average_change([part[field] for part in parts], name) for name, field in measures.items()},
        }
        for key, parts in found.items()
    ]
    columns = [
        *make_columns("student", "treatment"),
        Column("threshold", "tokens in a row"),
        *make_columns("class", "seeds", "n"),
        *fmt.make_change_columns(measures),
    ]
    return Table("thresholds", "Overlap classes for several lengths of overlap", columns, records)


def _average_change(entries: Records, measure: str) -> estimators.Estimate:
    if len(entries) == 1:
        return fmt.parse_estimate(entries[0]["change"], measure)
    mean = estimators.mean([entry["change"]["value"] for entry in entries])
    return fmt.parse_estimate(vars(mean), measure)
