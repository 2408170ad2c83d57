"""Chapters on claims, design, training, corpora, limits and provenance."""

from collections.abc import Sequence
from html import escape
from typing import Any

from jax_selftrain.report import figures
from jax_selftrain.report import formatting as fmt
from jax_selftrain.report.formatting import Chapter, Column, Record, Records, Results, Table, make_columns
from jax_selftrain.study.measure_names import REPRODUCED

AXES = ("lineage", "data", "data_order", "initialization", "tokenizer", "architecture", "size")
CLASSES = {
    "held_out": "held-out",
    REPRODUCED: "held-out, reproduced by the base",
    "partial": "partial",
    "seen": "seen",
}
LOG_KEYS = ("step", "loss", "learning_rate", "grad_norm")
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
        chapter.add_note(fmt.NOTES["claims"])
    else:
        chapter.html.append(fmt.NOTES["no_claims"])
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
    student = f" of {claim['student'] or ', '.join(claim['bases'])}" if claim["student"] or claim["bases"] else ""
    comparator = f" more than {claim['comparator']}" if claim["comparator"] else ""
    margin = f" within {claim['margin']:g}" if claim["margin"] is not None else ""
    least = f" by at least {claim['at_least']:g}" if claim["at_least"] is not None else ""
    others = f", and: {', '.join(claim['requires'])}" if claim["requires"] else ""
    return f"{claim['treatment']} {claim['direction']} {claim['measure']}{student}{comparator}{margin}{least}{others}"


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
        model
        | {axis: model[axis] or "not given" for axis in axes}
        | {"role": " and ".join(role for role, names in roles.items() if model["name"] in names)}
        | ability.get(model["name"], {})
        for model in design["models"]
    ]
    chapter = Chapter("Design")
    columns = [Column("model", path=("name",)), *make_columns("role", *axes, *SIZES, *measured)]
    chapter.add_table(Table("models", "Models and their ability before training", columns, records))
    if (split := results["config"].get("split", "all")) != "all":
        chapter.add_note(fmt.NOTES["split"].format(split=split))
    chapter.add_table(_make_budget_table(results))
    chapter.add_note(fmt.NOTES["design"])
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
        if any(part.get("best_step") for part in trained):
            values["best_step"] = [part["best_step"] for part in trained]
        values["corpus_documents"] = [part["samples"] for part in corpora]
        values["corpus_tokens"] = [part["tokens"] for part in corpora]
        means = {name: round(sum(one) / len(one)) if one else None for name, one in values.items()}
        records.append({**key, "seeds": len(cells), **means})
    return Table("budget", "Training budgets, means over seeds", make_columns(*records[0]), records)


def write_training(results: Results) -> Chapter | None:
    """Return the chapter on training; None if nothing was trained."""
    cells = [cell for cell in results["cells"] if cell["training"]]
    if not cells:
        return None
    chapter = Chapter("Training")
    logs = {f"{cell['treatment']}, seed {cell['seed']}, {cell['student']}": cell["training"]["log"] for cell in cells}
    panels = [
        ("optimizer step", title, {name: (log["step"], log[key]) for name, log in logs.items()})
        for key, title in (("loss", "training loss (nats per token)"), ("learning_rate", "learning rate"))
    ]
    chapter.add_figure(
        figures.plot_panels("training", panels, figures.draw_curves, fmt.list_treatments(results)), "Each logged step."
    )
    records = [(cell, record) for cell in cells for record in _list_steps(cell["training"]["log"], LOG_KEYS)]
    columns = [Column(key, digits=6) for key in LOG_KEYS]
    chapter.add_table(fmt.make_cell_table("training", "Training log", columns, records), folded=True)
    chapter.add_note(fmt.NOTES["training"])
    if any(cell["training"].get("best_step") for cell in cells):
        chapter.add_note(fmt.NOTES["best_epoch"])
    _add_evaluations(chapter, results, [cell for cell in cells if cell["training"]["evaluations"]])
    return chapter


def _list_steps(series: Record, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Return a record for each step of some series."""
    return [dict(zip(keys, values, strict=True)) for values in zip(*(series[key] for key in keys), strict=True)]


def _add_evaluations(chapter: Chapter, results: Results, cells: Records) -> None:
    if not cells:
        return
    first = cells[0]["training"]["evaluations"]
    curves = [
        {"step": found["step"], **{one["name"]: one["values"] for one in found["measures"]}}
        for found in (cell["training"]["evaluations"] for cell in cells)
    ]
    names = [name for name in dict.fromkeys(name for curve in curves for name in curve) if name != "step"]
    if len(cells) == 1:
        panels = []
        for kind, (title, scale) in fmt.CURVE_METRICS.items():
            lines = {
                name.rpartition("/")[0]: (first["step"], [scale * value for value in curves[0][name]])
                for name in names
                if name.endswith(f"/{kind}")
            }
            panels += [("optimizer step", title, lines)] if lines else []
        for i in range(0, len(panels), 3):
            figure = figures.plot_panels(f"evaluations_{i // 3}", panels[i : i + 3], figures.draw_curves)
            chapter.add_figure(figure, "Evaluations by optimizer step.")
    _add_class_curves(chapter, results, cells, curves)
    columns = [Column("step"), *(Column(name, name, 4) for name in names)]
    records = [
        (cell, record)  # the cells have different overlap classes
        for cell, curve in zip(cells, curves, strict=True)
        for record in _list_steps(dict.fromkeys(names, [None] * len(curve["step"])) | curve, ["step", *names])
    ]
    table = fmt.make_cell_table("evaluations", "Evaluations during training", columns, records)
    chapter.add_table(table, folded=len(cells) > 1)
    shown = [one for one in first["measures"] if len(cells) == 1 or _parse_class(one["name"]) is None]
    sizes = "; ".join(f"{one['name']}: n = {one['n']:,}" for one in shown)
    chapter.add_note(
        f"{sizes}. All points of a curve use the same documents and sequences. acc, exact_match and pz are "
        "proportions, nll is in nats per token, log_pz in nats per suffix."
    )


def _parse_class(name: str) -> tuple[str, str] | None:
    """Return metric and overlap class of a measure, as `NAME/METRIC/CLASS`."""
    _, metric, part = ("//" + name).rsplit("/", 2)
    return (metric, part) if part in CLASSES else None


def _add_class_curves(chapter: Chapter, results: Results, cells: Records, curves: Records) -> None:
    """Plot each overlap class during training, averaged over seeds."""
    for student in dict.fromkeys(cell["student"] for cell in cells):
        found: dict[tuple[str, str], dict[str, list[tuple[Any, Any]]]] = {}
        for cell, curve in zip(cells, curves, strict=True):
            for name, values in curve.items() if cell["student"] == student else ():
                if (key := _parse_class(name)) is not None:
                    found.setdefault(key, {}).setdefault(cell["treatment"], []).append((curve["step"], values))
        for metric in dict.fromkeys(metric for metric, _ in found):
            title, scale = fmt.CURVE_METRICS[metric]
            panels = []
            for part, label in CLASSES.items():
                lines = {
                    treatment: (
                        fmt.average_curves([steps for steps, _ in seeds]),
                        [scale * value for value in fmt.average_curves([values for _, values in seeds])],
                    )
                    for treatment, seeds in found.get((metric, part), {}).items()
                }
                panels += [("optimizer step", f"{label}: {title}", lines)] if lines else []
            name = f"class_curves_{metric}_{fmt.slugify(student)}"
            chapter.add_figure(
                figures.plot_panels(name, panels, figures.draw_trajectories, fmt.list_treatments(results)),
                f"{student}: {title.partition(' (')[0]} by overlap with the training corpora, during training (means "
                "over seeds). Sequences that the base reproduces are those of step 0.",
            )


def write_corpora(results: Results) -> Chapter:
    """Return the chapter on the statistics of the corpora."""
    chapter = Chapter("Training corpora")
    columns = [
        *(Column("corpus", path=("label",)), Column("documents", path=("samples",)), Column("tokens")),
        *(Column(f"length_{key}", f"length, {key}", 1, path=("length", key)) for key in ("mean", "median", "max")),
        Column("stopped", "ended by a stop token"),
        Column("nll", "−log p per token (nats)", path=("nll_per_token",)),
        Column("entropy", "entropy per token (nats)", path=("entropy_per_token",)),
        *(Column(f"distinct_{n}", f"distinct-{n}", path=("distinct", str(n))) for n in (1, 2, 3, 4)),
        Column("duplicates"),
        Column("contaminated", "questions with a 13-gram in the corpus"),
        Column("questions", "questions of at least 13 words", path=("contamination", "questions")),
        Column("changed", "documents that retokenize differently"),
        Column("broken", "broken characters dropped", path=("retokenized", "broken_characters")),
        Column("tokens_per_byte"),
    ]
    records = [_make_corpus_record(corpus) for corpus in results["corpora"].values()]
    chapter.add_table(Table("corpora", "Training corpora", columns, records))
    chapter.add_note(fmt.NOTES["corpora"])
    return chapter


def _make_corpus_record(corpus: Record) -> Record:
    changes, overlap = corpus["retokenized"] or {}, corpus["contamination"]
    text_bytes = changes.get("text_bytes")
    return {
        **corpus["statistics"],
        **corpus,
        "contaminated": overlap["found"] if overlap["questions"] else None,
        "changed": changes.get("changed", corpus["retokenization_mismatches"]),
        "tokens_per_byte": corpus["tokens"] / text_bytes if text_bytes else None,
    }
