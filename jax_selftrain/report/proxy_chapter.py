"""The chapter on what was known of the corpora beforehand, and whether it foretold the gain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_selftrain.report.formatting import decimals, label
from jax_selftrain.report.page import Chapter, note_html
from jax_selftrain.report.tables import Column, Table
from jax_selftrain.stats.estimators import Estimate
from jax_selftrain.study.measure_names import display_scale


def proxy_chapter(results: Mapping[str, Any]) -> Chapter | None:
    """None where no proxies were measured."""
    proxies = results["proxies"]
    if proxies is None:
        return None
    measure = proxies["measure"]
    tables = (_relations(proxies, measure), _by_cell(results, measure))
    reliability = proxies["reliability"]
    reliable = (
        "With one seed nothing is known of how reliable the gains are. "
        if reliability is None
        else f"The gains' reliability over seeds (Spearman–Brown) is {reliability:.2f}: no proxy can be expected to "
        f"correlate with them much better than {reliability**0.5:.2f}. "
    )
    embedder = proxies["config"].get("embedding_model")
    semantic = f", semantic similarity of those of {embedder}" if embedder else ""
    note = (
        f"{reliable}Rank correlations with the change of {label(measure)}, centered within students; p from "
        "permuting the sources, all students at once, corrected by Benjamini and Hochberg. The interval (90 %) counts "
        "the sources. Regret is what choosing each student's source by the proxy loses against the best one. "
        f"Similarity is of TF-IDF vectors{semantic}. Likelihood per token compares nothing across tokenizers."
    )
    html = "\n".join([tables[0].to_html(), note_html(note), tables[1].to_html()])
    return Chapter("Could it be known beforehand?", html, tables)


def _relations(found: Mapping[str, Any], measure: str) -> Table:
    scale, digits = display_scale(measure), decimals(measure)
    columns = (
        Column("proxy", "proxy"),
        Column("verdict", "verdict"),
        Column("reason", "because"),
        Column("correlation", "correlation", 2, signed=True),
        Column("p_adjusted", "p, corrected", 3, p_value=True),
        Column("partial", "at equal strength", 2, signed=True),
        Column("p_partial", "p", 3, p_value=True),
        Column("without_own", "without own text", 2, signed=True),
        Column("p_without_own", "p", 3, p_value=True),
        Column("cells", "cells"),
        Column("sources", "sources"),
        Column("regret", "regret", digits, scale),
        Column("random_regret", "of a random choice", digits, scale),
    )
    rows = tuple(
        (
            one["name"].replace("_", " "),
            one["verdict"],
            one["reason"],
            None
            if one["correlation"] is None
            else Estimate(one["correlation"], one["low"], one["high"], one["sources"]),
            *(one[key] for key in ("p_adjusted", "partial", "p_partial", "without_own", "p_without_own")),
            *(one[key] for key in ("cells", "sources", "regret", "random_regret")),
        )
        for one in found["relations"]
    )
    return Table("proxies", "What was known beforehand, and the gain", columns, rows)


def _by_cell(results: Mapping[str, Any], measure: str) -> Table:
    names = [one["name"] for one in results["proxies"]["relations"]]
    columns = (
        Column("student", "student"),
        Column("source", "source"),
        Column("seed", "seed"),
        *(Column(name, name.replace("_", " ")) for name in names),
        Column("change", f"change: {label(measure)}", decimals(measure), display_scale(measure), signed=True),
    )
    rows = tuple(
        (
            cell["student"],
            cell["source"],
            str(cell["seed"]),
            *(cell["proxies"][name] for name in names),
            cell["measures"][measure]["change"]["value"],
        )
        for cell in results["cells"]
        if cell["proxies"] is not None
    )
    return Table("proxies_by_cell", "Every corpus before training", columns, rows)
