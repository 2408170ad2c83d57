"""The chapter on what was known of the corpora beforehand, and whether it foretold the gain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_selftrain.study.measures import scale_of
from jax_selftrain.study.reports.page import Chapter, remark
from jax_selftrain.study.reports.shown import digits_of, label_of
from jax_selftrain.study.reports.tables import Column, Table
from jax_selftrain.study.statistics import Estimate


def proxy_chapter(results: Mapping[str, Any]) -> Chapter | None:
    """None where no proxies were measured."""
    found = results["proxies"]
    if found is None:
        return None
    measure = found["measure"]
    tables = (_relations(found, measure), _by_cell(results, measure))
    reliability = found["reliability"]
    reliable = (
        "With one seed nothing is known of how reliable the gains are. "
        if reliability is None
        else f"The gains' reliability over seeds (Spearman–Brown) is {reliability:.2f}: no proxy can be expected to "
        f"correlate with them much better than {reliability**0.5:.2f}. "
    )
    embedder = results["config"].get("embedding_model")
    semantic = f", semantic similarity of those of {embedder}" if embedder else ""
    note = (
        f"{reliable}Rank correlations with the change of {label_of(measure)}, centred within students; p from "
        "permuting the sources, all students at once, corrected by Benjamini and Hochberg. The interval (90 %) counts "
        "the sources. Regret is what choosing each student's source by the proxy loses against the best one. "
        f"Similarity is of TF-IDF vectors{semantic}. Likelihood per token compares nothing across tokenizers."
    )
    html = "\n".join([tables[0].to_html(), remark(note), tables[1].to_html()])
    return Chapter("Could it be known beforehand?", html, tables)


def _relations(found: Mapping[str, Any], measure: str) -> Table:
    scale, digits = scale_of(measure), digits_of(measure)
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
        Column("change", f"change: {label_of(measure)}", digits_of(measure), scale_of(measure), signed=True),
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
