"""Chapter on verbatim memorization, by overlap class, group and prompt format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jax_selftrain.report import figures
from jax_selftrain.report import formatting as fmt
from jax_selftrain.report.formatting import Records, Results
from jax_selftrain.report.page import Chapter
from jax_selftrain.report.tables import Column, Table, make_columns, make_side_columns
from jax_selftrain.stats import estimators
from jax_selftrain.study.measure_names import HELD_OUT, common_measures, display_scale, is_secondary

CLASSES = {"all": "all sequences", "held_out": "held-out", "partial": "partial", "seen": "seen", HELD_OUT: "H"}
FLIPS = {"kept": "kept", "lost": "lost", "gained": "gained", "neither": "both_wrong"}
"""Column and field of `results.json`."""
MEASURES: dict[str, tuple[str, int, float]] = {
    "exact_match": ("exact match (%)", 1, 100),
    "token_accuracy": ("greedy token accuracy (%)", 1, 100),
    "logprob": ("mean log p_z (nats)", 2, 1),
    "pz": ("mean p_z (%)", 1, 100),
}
"""Heading, decimals and scale."""


def write_memorization(results: Results) -> Chapter | None:
    """Return the chapter; None without an extraction set."""
    cells = results["cells"]
    if not cells[0]["extraction"]:
        return None
    chapter, first, several = Chapter("Verbatim memorization"), cells[0]["extraction"], len(cells) > 1
    chapter.html.append(
        f"<p>The model gets the first {first['prefix']} tokens of each sequence. <em>Exact match</em>: its greedy "
        f"continuation equals the {first['suffix']} tokens of the suffix. <em>p<sub>z</sub></em>: the probability of "
        "the suffix at temperature 1, which can stay high when a small drift breaks the greedy continuation. Read "
        "both together. For text outside the training data these numbers show how predictable it is.</p>"
    )
    for student in results["design"]["students"]:
        if several:
            _add_effects(chapter, student, fmt.select_student(results["effects"], student))
        _add_discoverability(chapter, student, fmt.select_student(cells, student))
    if not several:
        _add_part_figure(chapter, first)
        chapter.add_table(_make_discoverability_table(first), folded=True)
    chapter.add_table(_make_sequence_table(cells), folded=several)
    for table in (_make_threshold_table(cells), *_make_contrast_tables(results)):
        if table.rows:
            chapter.add_table(table)
    chapter.add_note(
        f"Seen: the corpus contains the whole suffix; partial: at least {first['min_overlap']} of its tokens in a "
        "row; held-out: fewer. Kept: reproduced before and after; lost: only before; gained: only after. The source "
        "selects these classes, and a model writes what it memorized best, so their difference is not the effect of "
        "the corpus. Swapped corpora estimate that effect from the same sequences in students that saw them and "
        "students that did not. H is half of the set, assigned by hash before sampling: the decontaminated corpus "
        "contains nothing of it, and the size-matched control lacks as much other text. p_z is the probability of "
        "one tokenization. Classes of fewer than 50 sequences are descriptive. If the set was chosen because the "
        "base reproduces it, part of a fall is regression to the mean."
    )
    return chapter


def _add_effects(chapter: Chapter, student: str, effects: Records) -> None:
    from_source = [one for one in effects if one["source"]] or effects  # other arms have no overlap classes
    measures = [name for name in common_measures(from_source) if name.startswith(("exact_match", "log_pz", "pz"))]
    for name, caption, secondary in (
        ("memorization", "memorization", False),
        ("formats", "other prompt formats, and after relearning", True),
    ):
        chosen = fmt.natural_sort(measure for measure in measures if is_secondary(measure) is secondary)
        if chosen:
            table = fmt.make_effect_table(f"{name}_{fmt.slugify(student)}", f"{student}, {caption}", effects, chosen)
            chapter.add_table(table)


def _list_parts(extraction: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return (name, part) of all sequences and of each class and group."""
    classes = [(name, extraction["classes"][key]) for key, name in CLASSES.items() if key in extraction["classes"]]
    return classes + [(f"group {part['name']}", part) for part in extraction["groups"]]


def _add_part_figure(chapter: Chapter, extraction: Mapping[str, Any]) -> None:
    parts = {name: part["exact_match"] for name, part in _list_parts(extraction) if part["n"]}
    svg = figures.plot_before_and_after(
        "extraction",
        list(parts),
        [fmt.parse_displayed_sides(entry, "exact_match") for entry in parts.values()],
        value_label="exact match (%)",
        change_label="change (points)",
    )
    chapter.add_figure("extraction", svg, "Exact match before and after, and the paired change, with 95 % intervals.")


def _add_discoverability(chapter: Chapter, student: str, cells: Records) -> None:
    """Plot (n, p)-discoverable extraction, means over seeds."""
    entries = cells[0]["extraction"]["discoverable"]
    treatments = list(dict.fromkeys(cell["treatment"] for cell in cells))
    probabilities = list(dict.fromkeys(entry["p"] for entry in entries))

    def average(members: Records, p: float, side: str) -> tuple[list[int], list[float]]:
        curves = [[e for e in cell["extraction"]["discoverable"] if e["p"] == p] for cell in members]
        values = [[100 * entry[side]["value"] for entry in curve] for curve in curves]
        return [entry["draws"] for entry in curves[0]], [sum(at) / len(at) for at in zip(*values, strict=True)]

    panels = [
        (
            f"samples n, p ≥ {p:g}",
            "% of sequences",
            {"before": average(cells[:1], p, "before")}
            | {one: average([cell for cell in cells if cell["treatment"] == one], p, "after") for one in treatments},
        )
        for p in probabilities
    ]
    name = f"discoverability_{fmt.slugify(student)}"
    chapter.add_figure(
        name,
        figures.plot_discoverability(name, panels),
        f"{student}: (n, p)-discoverable extraction, the share of {cells[0]['extraction']['n']:,} sequences that n "
        "samples at temperature 1 contain with probability p or more (means over seeds).",
    )


def _make_discoverability_table(extraction: Mapping[str, Any]) -> Table:
    heads = [
        Column("samples", "samples n"),
        Column("p", "p", 1),
        Column("sequences"),
        *make_side_columns("extracted", "extracted (%)"),
    ]
    rows = [
        (*fmt.pick(entry, "draws", "p"), extraction["n"], *fmt.parse_sides(entry))
        for entry in extraction["discoverable"]
    ]
    return Table("discoverability", "(n, p)-discoverable extraction: 1 − (1 − p_z)ⁿ ≥ p", heads, rows)


def _make_sequence_table(cells: Records) -> Table:
    measures = [name for name in MEASURES if name in cells[0]["extraction"]["classes"]["all"]]
    heads = [
        *make_columns("sequences", "n", *FLIPS),
        Column("mcnemar_p", "McNemar p", p_value=True),
        *(column for name in measures for column in make_side_columns(name, *MEASURES[name])),
    ]
    rows = [
        (cell, (name, part["n"], *(_list_values(part, measures) if part["n"] else [None] * (len(heads) - 2))))
        for cell in cells
        for name, part in _list_parts(cell["extraction"])
    ]
    return fmt.make_cell_table("extraction", "Sequences before and after, by overlap class and group", heads, rows)


def _list_values(part: Mapping[str, Any], measures: Sequence[str]) -> list[Any]:
    flips = fmt.pick(part["flips"], *FLIPS.values(), "mcnemar_p")
    return [*flips, *(estimate for name in measures for estimate in fmt.parse_sides(part[name]))]


def _make_threshold_table(cells: Records) -> Table:
    """Return mean changes by overlap class for several lengths of overlap."""
    measures = {"logprob": "log_pz", "exact_match": "exact_match"}
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for cell in cells:
        for part in cell["extraction"].get("thresholds", ()):
            if part["n"]:
                key = (*fmt.pick(cell, "student", "treatment"), *fmt.pick(part, "threshold", "class"))
                found.setdefault(key, []).append(part)
    rows = [
        (
            *key[:3],
            key[3].replace("_", "-"),
            len(parts),
            round(sum(part["n"] for part in parts) / len(parts)),
            *(_average_change([part[key] for part in parts], measure) for key, measure in measures.items()),
        )
        for key, parts in found.items()
    ]
    heads = [
        *make_columns("student", "treatment"),
        Column("threshold", "tokens in a row"),
        *make_columns("class", "seeds", "n"),
        *fmt.make_change_columns(measures.values()),
    ]
    return Table("thresholds", "Overlap classes for several lengths of overlap", heads, rows)


def _average_change(entries: Sequence[Mapping[str, Any]], measure: str) -> estimators.Estimate:
    changes = [fmt.parse_estimate(entry["change"]) for entry in entries]
    change = changes[0] if len(changes) == 1 else estimators.mean([one.value for one in changes])
    return fmt.to_display_units(change, measure)


def _make_contrast_tables(results: Results) -> tuple[Table, Table]:
    """Return the tables of decontamination and of swapped corpora."""
    heads = [
        *make_columns("student", "decontaminated", "size_matched", "measure"),
        Column("difference", "decontaminated − size-matched", 4, signed=True),
        *make_columns("n", "seeds"),
    ]
    rows = [
        (
            *fmt.pick(one, "student", "decontaminated", "size_matched"),
            fmt.format_measure(one["measure"]),
            fmt.parse_displayed(one["difference"], one["measure"]),
            one["n"],
            len(one["seeds"]),
        )
        for one in results["decontamination"]
    ]
    decontamination = Table("decontamination", "Decontaminated corpus and size-matched control", heads, rows)
    heads = [
        *make_columns("student", "treatment", "measure"),
        Column("effect", "effect of the corpus containing a sequence", signed=True),
        Column("naive", "seen − held-out", signed=True),
        *make_columns("n", "seeds"),
    ]
    rows = [
        (
            *fmt.pick(one, "student", "treatment"),
            fmt.format_measure(one["measure"]),
            fmt.parse_displayed(one["effect"], one["measure"]),
            None if one["naive"] is None else display_scale(one["measure"]) * one["naive"],
            one["effect"]["n"],
            one["seeds"],
        )
        for one in results["swap_effects"]
    ]
    return decontamination, Table("swap_effects", "Effect of seen sequences, by swapped corpora", heads, rows)
