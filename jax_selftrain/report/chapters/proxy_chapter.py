"""Chapter on proxies of the gain, measured before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_selftrain.report.formatting import Results, format_measure, get_decimals, pick
from jax_selftrain.report.page import Chapter
from jax_selftrain.report.tables import Column, Table, make_columns
from jax_selftrain.stats.estimators import Estimate
from jax_selftrain.study.measure_names import display_scale


def write_proxies(results: Results) -> Chapter | None:
    """Return the chapter; None if no proxies were measured."""
    proxies = results["proxies"]
    if proxies is None:
        return None
    chapter, measure, reliability = (
        Chapter("Prediction of the gain by proxies"),
        proxies["measure"],
        proxies["reliability"],
    )
    chapter.add_table(_make_relation_table(proxies))
    reliable = (
        "With one seed the reliability of the gains is unknown."
        if reliability is None
        else f"The reliability of the gains over seeds (Spearman–Brown) is {reliability:.2f}, which limits the "
        f"correlation of a proxy to about {reliability**0.5:.2f}."
    )
    embedder = results["config"].get("embedding_model")
    semantic = f", semantic similarity of embeddings by {embedder}" if embedder else ""
    chapter.add_note(
        f"{reliable} Rank correlations with the change of {format_measure(measure)}, centered within students; p from "
        "permutations of the sources, adjusted by Benjamini and Hochberg's method. The 90 % interval counts the "
        "sources. Regret is the loss from choosing each student's source by the proxy instead of the best one. "
        f"Similarity is of TF-IDF vectors{semantic}. Likelihood per token is not comparable across tokenizers."
    )
    names = [one["name"] for one in proxies["relations"]]
    heads = [
        *make_columns("student", "source", "seed", *names),
        Column(
            "change", f"change: {format_measure(measure)}", get_decimals(measure), display_scale(measure), signed=True
        ),
    ]
    rows = [
        (
            *pick(cell, "student", "source"),
            str(cell["seed"]),
            *pick(cell["proxies"], *names),
            cell["measures"][measure]["change"]["value"],
        )
        for cell in results["cells"]
        if cell["proxies"] is not None
    ]
    chapter.add_table(Table("proxies_by_cell", "Proxies of each corpus before training", heads, rows))
    return chapter


def _make_relation_table(proxies: Mapping[str, Any]) -> Table:
    scale, digits = display_scale(proxies["measure"]), get_decimals(proxies["measure"])
    heads = [
        *make_columns("proxy", "verdict", "reason"),
        Column("correlation", "correlation", 2, signed=True),
        Column("p_adjusted", "adjusted p", p_value=True),
        Column("partial", "partial correlation given source ability", 2, signed=True),
        Column("p_partial", "p", p_value=True),
        Column("without_own", "without own text", 2, signed=True),
        Column("p_without_own", "p", p_value=True),
        *make_columns("cells", "sources"),
        Column("regret", "regret", digits, scale),
        Column("random_regret", "regret of a random choice", digits, scale),
    ]
    rows = [
        (
            one["name"].replace("_", " "),
            *pick(one, "verdict", "reason"),
            None if one["correlation"] is None else Estimate(*pick(one, "correlation", "low", "high", "sources")),
            *pick(one, "p_adjusted", "partial", "p_partial", "without_own", "p_without_own"),
            *pick(one, "cells", "sources", "regret", "random_regret"),
        )
        for one in proxies["relations"]
    ]
    return Table("proxies", "Proxies and the gain", heads, rows)
