"""The chapter of a study's report on memorization: by class, group and format, without what is held out, by swaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jax_selftrain.report import figures
from jax_selftrain.report.effect_table import effect_table
from jax_selftrain.report.formatting import decimals, label, natural_sort, parse_estimate, slug, to_display_units
from jax_selftrain.report.page import Chapter, figure_html, note_html
from jax_selftrain.report.tables import Column, Table
from jax_selftrain.stats import estimators
from jax_selftrain.study.measure_names import common_measures, display_scale, is_secondary

Results = Mapping[str, Any]


def memorization_chapter(results: Results) -> Chapter | None:
    sourced = [one for one in results["effects"] if one["source"]]
    common = natural_sort(name for name in common_measures(sourced) if name.startswith(("exact_match", "log_pz", "pz")))
    if not common:
        return None
    plain, aside = ([name for name in common if is_secondary(name) is other] for other in (False, True))
    html: list[str] = []
    tables: list[Table] = []
    drawn: dict[str, str] = {}

    def show(table: Table) -> None:
        tables.append(table)
        html.append(table.to_html())

    for student in results["design"]["students"]:
        key = slug(student)
        of = [one for one in results["effects"] if one["student"] == student]
        cells = [cell for cell in results["cells"] if cell["student"] == student]
        show(effect_table(f"memorization_{key}", f"{student}: memorization", of, plain))
        if aside:
            show(effect_table(f"views_{key}", f"{student}: in other formats, and after relearning", of, aside))
        show(_flips(student, cells))
        thresholds = _thresholds(student, cells)
        if thresholds.rows:
            show(thresholds)
        drawn[f"draws_{key}"] = _n_p_table(f"draws_{key}", cells)
        html.append(
            figure_html(
                drawn[f"draws_{key}"],
                f"{student}: share of the {cells[0]['extraction']['n']:,} sequences that n independent draws at "
                "temperature 1 contain with at least that probability (means over seeds).",
            )
        )
    for name, table in (("decontamination", _decontamination_table), ("swap_effects", _swap_table)):
        if results[name]:
            show(table(results[name]))
    note = (
        "Held-out, partial and seen are selected by what the source wrote: a difference between them is not the effect "
        "of being seen. Where seeds drew different corpora, that effect is estimated by comparing the same sequences "
        "between students that saw them and students that did not (both ways, so that a better student is no effect); "
        "its interval is over sequences. H is half of the set, assigned by hash before anything was sampled; a "
        "scrubbed corpus shows nothing of it, and its companion lacks as much other text. p_z is the probability of "
        "one tokenization of the suffix."
    )
    return Chapter("Memorization by class and group", "\n".join([*html, note_html(note)]), tuple(tables), drawn)


def _flips(student: str, cells: Sequence[Results]) -> Table:
    kinds = ("kept", "lost", "gained", "both_wrong")
    rows = tuple(
        (
            cell["treatment"],
            str(cell["seed"]),
            cell["extraction"]["n"],
            *(cell["extraction"]["classes"]["all"]["flips"][kind] for kind in kinds),
        )
        for cell in cells
    )
    counted = (Column(kind, kind) for kind in kinds)
    columns = (Column("treatment", "treatment"), Column("seed", "seed"), Column("n", "n"), *counted)
    return Table(f"flips_{slug(student)}", f"{student}: sequences reproduced before and after", columns, rows)


def _thresholds(student: str, cells: Sequence[Results]) -> Table:
    """What the corpus showed, by other lengths of overlap; over the seeds in which the class has members."""
    measures = (("exact_match", "exact_match"), ("logprob", "log_pz"))
    found: dict[tuple[str, int, str], list[Results]] = {}
    for cell in cells:
        for part in cell["extraction"].get("thresholds", ()):
            if part["n"]:
                found.setdefault((cell["treatment"], part["threshold"], part["class"]), []).append(part)
    rows = tuple(
        (
            treatment,
            threshold,
            name.replace("_", " "),
            len(parts),
            round(sum(part["n"] for part in parts) / len(parts)),
            *(
                to_display_units(
                    estimators.mean([part[key]["change"]["value"] for part in parts])
                    if len(parts) > 1
                    else parse_estimate(parts[0][key]["change"]),
                    measure,
                )
                for key, measure in measures
            ),
        )
        for (treatment, threshold, name), parts in found.items()
    )
    columns = (
        Column("treatment", "treatment"),
        Column("threshold", "tokens in a row"),
        Column("class", "class"),
        Column("seeds", "seeds"),
        Column("n", "sequences"),
        *(Column(one, f"change: {label(one)}", decimals(one), signed=True) for _, one in measures),
    )
    caption = f"{student}: classes by how many tokens in a row the corpus showed"
    return Table(f"thresholds_{slug(student)}", caption, columns, rows)


def _n_p_table(name: str, cells: Sequence[Results]) -> str:
    def line(members: Sequence[Results], p: float, side: str) -> list[float]:
        curves = [[100 * e[side]["value"] for e in c["extraction"]["discoverable"] if e["p"] == p] for c in members]
        return [sum(at) / len(at) for at in zip(*curves, strict=True)]

    entries = cells[0]["extraction"]["discoverable"]
    treatments = list(dict.fromkeys(cell["treatment"] for cell in cells))
    panels = [
        (
            f"probability ≥ {p:g}",
            [
                line(cells[:1], p, "before"),
                *(line([c for c in cells if c["treatment"] == one], p, "after") for one in treatments),
            ],
        )
        for p in dict.fromkeys(entry["p"] for entry in entries)
    ]
    draws = [entry["draws"] for entry in entries if entry["p"] == entries[0]["p"]]
    return figures.n_p_discoverability_by_treatment(name, ["before", *treatments], draws, panels)


def _decontamination_table(found: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        Column("student", "student"),
        Column("arms", "arms"),
        Column("measure", "measure"),
        Column("difference", "decontaminated − size-matched", 4, signed=True),
        Column("n", "items"),
        Column("seeds", "seeds"),
    )
    rows = tuple(
        (
            one["student"],
            f"{one['decontaminated']} − {one['size_matched']}",
            label(one["measure"]),
            to_display_units(parse_estimate(one["difference"]), one["measure"]),
            one["n"],
            len(one["seeds"]),
        )
        for one in found
    )
    return Table("decontamination", "Without the held-out half, beside without as much other text", columns, rows)


def _swap_table(swaps: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        Column("student", "student"),
        Column("treatment", "treatment"),
        Column("measure", "measure"),
        Column("effect", "effect of being seen", 3, signed=True),
        Column("naive", "seen − held-out", 3, signed=True),
        Column("n", "sequences"),
        Column("seeds", "seeds"),
    )
    rows = tuple(
        (
            one["student"],
            one["treatment"],
            label(one["measure"]),
            to_display_units(parse_estimate(one["effect"]), one["measure"]),
            None if one["naive"] is None else display_scale(one["measure"]) * one["naive"],
            one["effect"]["n"],
            one["seeds"],
        )
        for one in swaps
    )
    return Table("swap_effects", "What being seen does, by swapped corpora", columns, rows)
