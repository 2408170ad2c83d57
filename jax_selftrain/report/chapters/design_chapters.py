"""Chapters on claims, design, limits and provenance."""

from __future__ import annotations

from html import escape

import yaml

from jax_selftrain.report.formatting import Results
from jax_selftrain.report.page import Chapter
from jax_selftrain.report.tables import Column, Record, Table, make_columns

AXES = ("lineage", "data", "data_order", "initialization", "tokenizer", "architecture", "size")
SIZES = ("family", "parameters", "layers", "width", "vocabulary")


def write_claims(results: Results) -> Chapter:
    """Return the chapter on the declared claims; without claims it says so."""
    chapter = Chapter("Claims")
    if results["claims"]:
        columns = [
            *make_columns("claim", "verdict", "reason"),
            Column("effect", digits=4, signed=True),
            Column("margin", digits=4),
            Column("seeds"),
            Column("p_adjusted", "adjusted p", p_value=True),
            Column("evidence"),
        ]
        records = [
            {**claim, "claim": f"{claim['name']}: {describe_claim(claim)}", "evidence": describe_evidence(claim)}
            for claim in results["claims"]
        ]
        chapter.add_table(Table("claims", "Declared claims and their verdicts", columns, records))
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


def describe_claim(claim: Record) -> str:
    """Return a claim in words."""
    student = f" of {claim['student']}" if claim["student"] else ""
    comparator = f" more than {claim['comparator']}" if claim["comparator"] else ""
    margin = f" within {claim['margin']:g}" if claim["margin"] is not None else ""
    return f"{claim['treatment']} {claim['direction']} {claim['measure']}{student}{comparator}{margin}"


def describe_evidence(claim: Record) -> str:
    """Return the evidence level of a claim in words."""
    return claim["evidence_level"] + (", post hoc" if claim["post_hoc"] else "")


def write_design(results: Results) -> Chapter:
    """Return the chapter on models and training budgets."""
    ability, design = results["base_ability"], results["design"]
    measured = list(dict.fromkeys(name for scores in ability.values() for name in scores))
    axes = [axis for axis in AXES if any(model[axis] for model in design["models"])]
    roles = {"source": design["sources"], "student": design["students"]}
    records = [
        {
            **model,
            **{axis: model[axis] or "not given" for axis in axes},
            "role": " and ".join(role for role, names in roles.items() if model["name"] in names),
            **dict.fromkeys(measured),
            **ability.get(model["name"], {}),
        }
        for model in design["models"]
    ]
    chapter = Chapter("Design")
    columns = [Column("model", path=("name",)), *make_columns("role", *axes, *SIZES, *measured)]
    chapter.add_table(Table("models", "Models and their ability before training", columns, records))
    chapter.add_table(_make_budget_table(results))
    chapter.add_note(
        "Ability before training: accuracy on tasks, bits per byte on texts. Steps, batch and learning rate are the "
        "same in all cells except where an arm sets them. The numbers of tokens differ because documents fill rows "
        "differently."
    )
    return chapter


def _make_budget_table(results: Results) -> Table:
    records = []
    for effect in results["effects"]:
        key = {name: effect[name] for name in ("student", "treatment")}
        cells = [cell for cell in results["cells"] if key.items() <= cell.items()]
        trained = [cell["training"] for cell in cells if cell["training"]]
        corpora = [results["corpora"][cell["corpus"]] for cell in cells if cell["corpus"]]
        values = {name: [part[name] for part in trained if part[name] is not None] for name in ("steps", "rows")}
        values["target_tokens"] = [part["targets"] for part in trained if part["targets"] is not None]
        values["corpus_documents"] = [part["samples"] for part in corpora]
        values["corpus_tokens"] = [part["tokens"] for part in corpora]
        means = {name: round(sum(one) / len(one)) if one else None for name, one in values.items()}
        records.append({**key, "seeds": len(cells), **means})
    return Table("budget", "Training budgets, means over seeds", make_columns(*records[0]), records)


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
    versions = [{"package": name, "version": version} for name, version in results["versions"].items()]
    chapter.add_table(Table("versions", "Versions", make_columns("package", "version"), versions))
    columns = [Column("model", path=("name",)), Column("sha256", "SHA-256", path=("fingerprint",))]
    chapter.add_table(Table("fingerprints", "Models", columns, results["design"]["models"]))
    columns = [Column("stage", path=("label",)), Column("key")]
    chapter.add_table(Table("stages", "Stages and their keys", columns, results["stages"]), folded=True)
    return chapter
