"""Chapter on repeated self-training, generation by generation."""

from statistics import fmean
from typing import Any

from jax_selftrain.report import figures
from jax_selftrain.report import formatting as fmt
from jax_selftrain.report.formatting import Chapter, Column, Record, Records, Results, Table, make_columns
from jax_selftrain.study.measure_names import common_measures, display_scale, main_measure, name_generations

_TAILS: dict[str, tuple[str, int, float, tuple[str, ...]]] = {
    **{f"distinct_{n}": (f"distinct-{n} (%)", 2, 100, ("distinct", str(n))) for n in (1, 2, 3, 4)},
    "unigram_entropy": ("unigram entropy (nats)", 3, 1, ("unigram_entropy",)),
    "rare_mass": ("rare tokens (%)", 3, 100, ("rare_mass",)),
}
"""Heading, decimals, scale and path of the measures of a corpus."""


def write_generations(results: Results) -> Chapter | None:
    """Return the chapter; None without arms of kind `generations`."""
    arms = [arm for arm in results["config"]["arms"] if arm["kind"] == "generations"]
    chapter, tokens = Chapter("Generations"), set[int]()
    for student in results["design"]["students"]:
        effects = {one["treatment"]: one for one in results["effects"] if one["student"] == student}
        records = []
        for arm in arms:
            for generation, name in enumerate(name_generations(arm["name"], arm["generations"]), 1):
                if name in effects:
                    cells = [
                        cell for cell in results["cells"] if (cell["student"], cell["treatment"]) == (student, name)
                    ]
                    tails = _find_tails(results, cells)
                    tokens |= {tail["distinct"]["tokens"] for tail in tails}
                    position = {"arm": arm["name"], "replay": arm["replay"], "generation": generation}
                    records.append({**effects[name], **position, **_average_tails(tails)})
        if records:
            _add_student(chapter, student, records, main_measure(results))
    if not chapter.tables:
        return None
    chapter.add_note(fmt.NOTES["generations"].format(tokens=" or ".join(f"{n:,}" for n in sorted(tokens))))
    return chapter


def _find_tails(results: Results, cells: Records) -> list[Record]:
    statistics = [results["corpora"][cell["corpus"]]["statistics"] for cell in cells if cell["corpus"]]
    return [one["tail"] for one in statistics if "tail" in one]


def _average_tails(tails: list[Record]) -> dict[str, Any]:
    found = {}
    for name, (_, _, _, path) in _TAILS.items():
        values = [Column(name, path=path).find(tail) for tail in tails]
        found[name] = fmean(value for value in values if isinstance(value, float | int)) if tails else None
    return found


def _add_student(chapter: Chapter, student: str, records: Records, main: str) -> None:
    chosen = ("accuracy", "exact_match", "pz", "exact_match/held_out", "pz/held_out")
    measures = [name for name in common_measures(records) if name in chosen or name.startswith("text/")]
    columns = [
        *make_columns("arm", "replay", "generation", "seeds"),
        *fmt.make_change_columns(measures),
        *(Column(name, title, digits, scale) for name, (title, digits, scale, _) in _TAILS.items()),
    ]
    name = f"generations_{fmt.slugify(student)}"
    chapter.add_table(Table(name, f"{student}: changes and tails of the corpus by generation", columns, records))
    panels = []
    arms: dict[str, list[Record]] = {}
    for record in records:
        arms.setdefault(record["arm"], []).append(record)

    def select(find: Any) -> dict[str, figures.Line]:
        return {arm: ([one["generation"] for one in rows], [find(one) for one in rows]) for arm, rows in arms.items()}

    measure = next((one for one in measures if one.startswith("text/")), main)
    scale = display_scale(measure)
    changes = select(lambda one: scale * one["measures"][measure]["change"]["value"])
    panels.append(("generation", f"change: {fmt.format_measure(measure)}", changes))
    for key in ("distinct_2", "rare_mass") if all(one["rare_mass"] is not None for one in records) else ():
        title, _, factor, _ = _TAILS[key]
        panels.append(("generation", title, select(lambda one, key=key, factor=factor: factor * one[key])))
    figure = figures.plot_panels(name, panels, figures.draw_curves)
    chapter.add_figure(figure, f"{student}: each generation's student and its corpus (means over seeds).")
