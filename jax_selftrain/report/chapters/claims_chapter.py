"""Chapter on the declared claims and their verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from jax_selftrain.report.formatting import Results, parse_estimate, pick
from jax_selftrain.report.page import Chapter
from jax_selftrain.report.tables import Column, Table, make_columns


def write_claims(results: Results) -> Chapter:
    """Return the chapter; without claims it says so."""
    chapter = Chapter("Claims")
    if results["claims"]:
        heads = [
            *make_columns("claim", "verdict", "reason"),
            Column("effect", digits=4, signed=True),
            Column("margin", digits=4),
            Column("seeds"),
            Column("p_adjusted", "adjusted p", p_value=True),
            Column("evidence"),
        ]
        rows = [
            (
                f"{claim['name']}: {describe_claim(claim)}",
                *pick(claim, "verdict", "reason"),
                parse_estimate(claim["effect"]) if claim["effect"] else None,
                *pick(claim, "margin", "seeds", "p_adjusted"),
                describe_evidence(claim),
            )
            for claim in results["claims"]
        ]
        chapter.add_table(Table("claims", "Declared claims and their verdicts", heads, rows))
        chapter.add_note(
            "Effects have the unit of the measure (0.01 is one point of accuracy), with 95 % intervals over seeds. "
            "Tests are one-sided at .05, adjusted by Holm's method for primary claims and by Benjamini and "
            "Hochberg's method for the others."
        )
    else:
        chapter.html.append(
            "<p>Not tested: the configuration declares no claims. A verdict needs an estimand, a margin and a test "
            "that are fixed before the first run.</p>"
        )
    seeds: dict[tuple[str, str], list[str]] = {}
    for cell in results["cells"]:
        if cell["identical"]:
            seeds.setdefault((cell["student"], cell["treatment"]), []).append(str(cell["seed"]))
    if seeds:
        names = "; ".join(f"{one}, {treatment}, seed {', '.join(of)}" for (one, treatment), of in seeds.items())
        chapter.html.append(f"<p>Every measured number is exactly that of the base in: {escape(names)}.</p>")
    return chapter


def describe_claim(claim: Mapping[str, Any]) -> str:
    """Return a claim in words."""
    student = f" of {claim['student']}" if claim["student"] else ""
    comparator = f" more than {claim['comparator']}" if claim["comparator"] else ""
    margin = f" within {claim['margin']:g}" if claim["margin"] is not None else ""
    return f"{claim['treatment']} {claim['direction']} {claim['measure']}{student}{comparator}{margin}"


def describe_evidence(claim: Mapping[str, Any]) -> str:
    """Return the evidence level of a claim in words."""
    return claim["evidence_level"] + (", post hoc" if claim["post_hoc"] else "")
