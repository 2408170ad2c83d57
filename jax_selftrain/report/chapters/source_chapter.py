"""Chapter on the matrix of students and sources and their interaction."""

from __future__ import annotations

from jax_selftrain.report import figures
from jax_selftrain.report import formatting as fmt
from jax_selftrain.report.formatting import Results
from jax_selftrain.report.page import Chapter
from jax_selftrain.report.tables import Column, Table, make_columns
from jax_selftrain.study.measure_names import (
    MAIN_EFFECT,
    common_measures,
    display_scale,
    is_primary_format,
    main_measure,
)


def write_source_matrix(results: Results) -> Chapter | None:
    """Return the chapter; None for one pair of source and student."""
    matrix = [one for one in results["effects"] if one["treatment"] == f"{MAIN_EFFECT}{one['source']}"]
    if len(matrix) < 2:
        return None
    chapter, main = Chapter("Which source's text a student can learn from"), main_measure(results)
    names = [name for name in common_measures(matrix) if is_primary_format(name)]
    svg = figures.plot_effects(
        "matrix",
        [f"{one['student']}, {one['treatment']}" for one in matrix],
        [fmt.parse_displayed(one["measures"][main]["change"], main) for one in matrix],
        [[display_scale(main) * value for value in one["measures"][main]["seeds"]] for one in matrix],
        label=f"change: {fmt.format_measure(main)}",
    )
    chapter.add_figure("matrix", svg, "Mean over seeds with its 95 % interval (Student's t); a dot for each seed.")
    if results["interaction"] is None:
        chapter.add_note(
            "No interaction: it needs at least two lineages of students, each with text of its own lineage and of "
            "another. Without it, a source that suits a student cannot be distinguished from a better source."
        )
    else:
        chapter.add_table(_make_interaction_table(results))
    rows = [
        (
            *fmt.pick(one, "student", "source"),
            len(one["seeds"]),
            *(fmt.parse_displayed_change(one["measures"][name], name) for name in names),
        )
        for one in matrix
    ]
    heads = [*make_columns("student", "source", "seeds"), *fmt.make_change_columns(names)]
    chapter.add_table(Table("matrix", "Change of each student, by source", heads, rows))
    return chapter


def _make_interaction_table(results: Results) -> Table:
    found = results["interaction"]
    rows = [
        (
            fmt.format_measure(name),
            fmt.parse_displayed(entry["contrast"], name),
            len(found["seeds"]),
        )
        for name, entry in found["measures"].items()
        if is_primary_format(name)
    ]
    heads = [Column("measure"), Column("contrast", "home − away", signed=True), Column("seeds")]
    return Table("interaction", "Home − away, averaged over students", heads, rows)
