"""Chapters on the training corpora and on samples from them."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from jax_selftrain.report.formatting import Results, pick
from jax_selftrain.report.page import Chapter
from jax_selftrain.report.tables import Column, Table, format_number, make_columns


def write_corpora(results: Results) -> Chapter:
    """Return the chapter on the statistics of the corpora."""
    chapter = Chapter("Training corpora")
    heads = [
        *make_columns("corpus", "documents", "tokens"),
        *(Column(f"length_{key}", f"length, {key}", 1) for key in ("mean", "median", "max")),
        Column("stopped", "ended by a stop token"),
        Column("nll", "−log p per token (nats)"),
        Column("entropy", "entropy per token (nats)"),
        *(Column(f"distinct_{n}", f"distinct-{n}") for n in (1, 2, 3, 4)),
        Column("duplicates"),
        Column("contaminated", "questions with a 13-gram in the corpus"),
        Column("questions", "questions of at least 13 words"),
        Column("changed", "documents that retokenize differently"),
        Column("broken", "broken characters dropped"),
        Column("tokens_per_byte"),
    ]
    rows = [_make_row(corpus) for corpus in results["corpora"].values()]
    chapter.add_table(Table("corpora", "Training corpora", heads, rows))
    chapter.add_note(
        "Lengths count the stop token but not the BOS token. −log p is under the source at temperature 1. The "
        "entropy is that of the sampling distribution. Duplicates and documents that a stop token ended are "
        "proportions."
    )
    return chapter


def _make_row(corpus: Mapping[str, Any]) -> tuple[Any, ...]:
    statistics, changes, overlap = corpus["statistics"], corpus["retokenized"] or {}, corpus["contamination"]
    text_bytes = changes.get("text_bytes")
    return (
        *pick(corpus, "label", "samples", "tokens"),
        *pick(statistics["length"], "mean", "median", "max"),
        *pick(statistics, "stopped", "nll_per_token", "entropy_per_token"),
        *pick(statistics["distinct"], "1", "2", "3", "4"),
        statistics["duplicates"],
        overlap["found"] if overlap["questions"] else None,
        overlap["questions"],
        changes.get("changed", corpus["retokenization_mismatches"]),
        changes.get("broken_characters"),
        corpus["tokens"] / text_bytes if text_bytes else None,
    )


def write_samples(results: Results) -> Chapter:
    """Return the chapter on random samples."""
    chapter = Chapter("Random samples")
    chapter.add_note("Chosen by a hash of the seed and the sample ids.")
    for corpus in results["corpora"].values():
        chapter.html.append(f"<h3>{escape(corpus['label'])}</h3>")
        chapter.html += [
            f'<div class="sample"><p class="label">{_describe_sample(sample)}</p>\n'
            f'<p class="words">{escape(sample["text"]) or "<em>(no text)</em>"}</p></div>'
            for sample in corpus["examples"]
        ]
    return chapter


def _describe_sample(sample: Mapping[str, Any]) -> str:
    parts = [f"sample {sample['sample_id']:,}", f"{sample['tokens']:,} tokens"]
    if sample["finish_reason"]:
        parts.append("ended by a stop token" if sample["finish_reason"] == "stop" else "cut at the length limit")
    if sample["logprob"] is not None and sample["tokens"]:
        parts.append(f"{format_number(-sample['logprob'] / sample['tokens'])} nats per token")
    return " · ".join(parts)
