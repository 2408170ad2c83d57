"""Chapters on the limits of the results and on their provenance."""

from __future__ import annotations

from html import escape

import yaml

from jax_selftrain.report.formatting import Results
from jax_selftrain.report.page import Chapter
from jax_selftrain.report.tables import Column, Table, make_columns


def write_limits(results: Results) -> Chapter:
    """Return the chapter on what the results cannot show."""
    sentences = [
        "<strong>Other training settings.</strong> Learning rate, budget and the final step are fixed; other "
        "settings may give other results.",
        "<strong>No change.</strong> An interval that includes zero is no evidence of absence; preservation needs a "
        "margin that is declared beforehand (<code>jax-selftrain compare</code>).",
        "<strong>Compatibility of a source and a student,</strong> without the interaction: one student cannot "
        "distinguish text that suits it from better text.",
        "<strong>Other models.</strong> Seeds vary corpora and training order; the bases are fixed.",
    ]
    if len(results["config"]["seeds"]) == 1:
        sentences.append(
            "<strong>Training settings in general.</strong> That takes several seeds, each with its own corpus and "
            "order; item-level tests such as McNemar's are significant too often for two seeds of the same settings."
        )
    if len(results["effects"]) == 1:
        sentences.append(
            "<strong>The cause of a change.</strong> Training on any text changes a model. The cause needs control "
            "arms: real text, shuffled text, weight noise of the same norm, a sign-flipped loss."
        )
    if results["cells"][0]["extraction"]:
        sentences += [
            "<strong>Forgetting,</strong> unless exact match falls below the control arms at equal damage and "
            "p<sub>z</sub> falls too. Weight noise also breaks greedy continuations.",
            "<strong>The effect of the training text on a sequence.</strong> The source selects the classes held-out, "
            "partial and seen; the causal effect needs a random assignment or swapped corpora.",
        ]
    items = "\n".join(f"<li>{sentence}</li>" for sentence in sentences)
    return Chapter("What this cannot show", [f"<ul>\n{items}\n</ul>"])


def write_provenance(results: Results) -> Chapter:
    """Return the chapter on configuration, models, stages and versions."""
    options = {key: value for key, value in results["config"].items() if key != "models"}
    config = yaml.safe_dump(options, sort_keys=False, allow_unicode=True, width=100)
    chapter = Chapter("Provenance", [f"<h3>Configuration</h3>\n<pre>{escape(config)}</pre>"])
    chapter.add_table(Table("versions", "Versions", make_columns("package", "version"), [*results["versions"].items()]))
    prints = [(model["name"], model["fingerprint"]) for model in results["design"]["models"]]
    chapter.add_table(Table("fingerprints", "Models", [Column("model"), Column("sha256", "SHA-256")], prints))
    stages = [(stage["label"], stage["key"]) for stage in results["stages"]]
    chapter.add_table(Table("stages", "Stages and their keys", make_columns("stage", "key"), stages), folded=True)
    return chapter
