"""Chapters on tasks, texts, the matrix of sources, and proxies."""

from dataclasses import asdict

from jax_selftrain.config import ArmConfig
from jax_selftrain.report import figures
from jax_selftrain.report import formatting as fmt
from jax_selftrain.report.formatting import Chapter, Column, Record, Records, Results, Table, make_columns
from jax_selftrain.stats.estimators import Estimate, finite_exp
from jax_selftrain.study.measure_names import (
    MAIN_EFFECT,
    common_measures,
    display_scale,
    is_primary_format,
    main_measure,
)

_FACTORS = ("start_id", "start_text", "temperature", "learning_rate", "epochs")
"""Options of arms with own text, from the corpus to the training; the last number that varies is horizontal."""


def write_capability(results: Results) -> Chapter | None:
    """Return the chapter on tasks."""
    cells = results["cells"]
    if not cells[0]["tasks"]:
        return None
    chapter, several = Chapter("Capability"), len(cells) > 1
    if several:
        for student in results["design"]["students"]:
            _add_effects(chapter, results, [one for one in results["effects"] if one["student"] == student])
    else:
        tasks = cells[0]["tasks"]
        chance = [None if task["chance"] is None else 100 * task["chance"] for task in tasks]
        accuracies = {task["name"]: task["accuracy"] for task in tasks}
        figure = figures.plot_before_and_after("tasks", accuracies, "task/", "accuracy (%)", chance)
        chapter.add_figure(figure, "Accuracy before and after, and the paired change, with 95 % intervals.")
    chapter.add_table(_make_task_table(cells), folded=several)
    chapter.add_note(fmt.NOTES["capability"])
    return chapter


def _add_effects(chapter: Chapter, results: Results, effects: Records) -> None:
    names, student, treatments = common_measures(effects), effects[0]["student"], fmt.list_treatments(results)
    if "accuracy" in names and len(fmt.select_matrix(results)) > 1:  # else it is on the first screen
        entries = {one["treatment"]: one["measures"]["accuracy"] for one in effects}
        styles = figures.assign_styles(entries, treatments)
        figure = figures.plot_effects(f"capability_{fmt.slugify(student)}", entries, "accuracy", styles)
        chapter.add_figure(figure, f"{student}: change of accuracy by treatment, with a dot for each seed.")
    accuracies = [name for name in names if name.startswith(("accuracy", "task/"))]
    odds = [name for name in names if name.startswith("log_odds")]
    fmt.add_effect_table(chapter, "capability", student, "accuracy by task", effects, accuracies)
    fmt.add_effect_table(chapter, "log_odds", student, "log-odds of the correct choice by task", effects, odds)


def _make_task_table(cells: Records) -> Table:
    columns = [
        *(Column("task", path=("name",)), Column("n")),
        Column("chance", "chance (%)", 1, 100),
        Column("eligible", "in the macro average"),
        *fmt.make_side_columns("accuracy", "accuracy (%)"),
        *(Column(key, path=("flips", key)) for key in ("lost", "gained")),
        Column("mcnemar_p", "McNemar p", p_value=True, path=("flips", "mcnemar_p")),
        Column("q", p_value=True, path=("flips", "q")),
        Column("log_odds_change", "change of log-odds", signed=True, path=("log_odds", "change")),
    ]
    records = [
        (cell, {"log_odds": task.get("word_loglikelihood"), **task, "eligible": task["not_eligible"] or "yes"})
        for cell in cells
        for task in cell["tasks"]
    ]
    records += [
        (cell, {"name": name, "n": cell["macro"]["n"], "accuracy": cell["macro"][key]})
        for cell in cells
        if cell["macro"]
        for name, key in (("macro average", "accuracy"), ("chance-normalized macro average", "chance_normalized"))
    ]
    return fmt.make_cell_table("tasks", "Tasks before and after", columns, records)


def write_perplexity(results: Results) -> Chapter | None:
    """Return the chapter on texts."""
    cells = results["cells"]
    if not cells[0]["texts"]:
        return None
    chapter, several = Chapter("Perplexity"), len(cells) > 1
    for student in results["design"]["students"] if several else ():
        effects = [one for one in results["effects"] if one["student"] == student]
        names = [name for name in common_measures(effects) if name.startswith("text/")]
        fmt.add_effect_table(chapter, "texts", student, "held-out texts", effects, names)
    columns = [
        *(Column("text", path=("name",)), *make_columns("documents", "tokens")),
        *fmt.make_side_columns("nll", "nats per token", 4, 1),
        Column("perplexity_before", "perplexity, before", 2, path=("nll", "before"), convert=_exponentiate),
        Column("perplexity_after", "after", 2, path=("nll", "after"), convert=_exponentiate),
        Column("documents_better", "documents with a lower loss"),
    ]
    records = [(cell, text) for cell in cells for text in cell["texts"]]
    chapter.add_table(fmt.make_cell_table("texts", "Texts before and after", columns, records), folded=several)
    chapter.add_note(fmt.NOTES["perplexity"])
    return chapter


def _exponentiate(entry: Record) -> Estimate | None:
    value, low, high = (finite_exp(entry[end]) for end in ("value", "low", "high"))
    if high is None:
        low = None
    return None if value is None else Estimate(value, low, high, entry["n"])


def write_source_matrix(results: Results) -> Chapter | None:
    """Return the chapter on sources; None for one pair of models."""
    matrix = fmt.select_matrix(results)
    if len(matrix) < 2:
        return None
    chapter = Chapter("Which source's text a student can learn from")
    names = [name for name in common_measures(matrix) if is_primary_format(name)]
    chapter.add_note(fmt.NOTES["relations" if results["relations"] else "no_relations"])
    if results["relations"]:
        columns = [
            Column("contrast", "relation of source and student", convert=fmt.format_contrast),
            Column("student", convert=lambda student: student or "all"),
            Column("measure", convert=fmt.format_measure),
            Column("estimate", "difference", signed=True, measure="*"),
            Column("seeds"),
        ]
        records = [
            {**one, "measure": name, "estimate": found["contrast"], "seeds": found["seeds"]}
            for one in results["relations"]["contrasts"]
            for name, found in one["measures"].items()
            if is_primary_format(name)
        ]
        chapter.add_table(Table("relations", "Differences between relations of source and student", columns, records))
        if alone := results["relations"]["unrelated_sources"]:
            chapter.add_note(fmt.NOTES["unrelated_sources"].format(sources=", ".join(alone)))
    columns = [*make_columns("student", "source", "seeds"), *fmt.make_change_columns(names)]
    chapter.add_table(Table("matrix", "Change of each student, by source", columns, matrix))
    return chapter


def write_response_surface(results: Results) -> Chapter | None:
    """Return the chapter on arms that vary several options; else None."""
    records, main = _list_settings(results), main_measure(results)
    factors = [name for name in _FACTORS if len({str(record[name]) for record in records}) > 1]
    numbers = [name for name in factors if all(isinstance(record[name], int | float) for record in records)]
    if len(factors) < 2 or not numbers:
        return None
    chapter, across = Chapter("Response surface"), numbers[-1]
    names = [name for name in common_measures(records) if is_primary_format(name)]
    for student in dict.fromkeys(record["student"] for record in records):
        own = sorted((one for one in records if one["student"] == student), key=lambda one: float(one[across]))
        points: dict[str, list[tuple[float, ...]]] = {}
        for one in own:
            others = (name for name in factors if name != across and one[name] is not None)
            label = ", ".join(f"{name.replace('_', ' ')} {one[name]}" for name in others)
            change = fmt.parse_change(one["measures"][main], main)
            low, high = (change.value if end is None else end for end in (change.low, change.high))
            points.setdefault(label, []).append((float(one[across]), change.value, low, high))
        lines = {label: tuple(zip(*rows, strict=True)) for label, rows in points.items()}
        panel = (across.replace("_", " "), f"change: {fmt.format_measure(main)}", lines)
        key = fmt.slugify(student)
        figure = figures.plot_panels(f"response_{key}", [panel], figures.draw_response)
        chapter.add_figure(figure, f"{student}: mean over seeds with its 95 % interval.")
        columns = [*(Column(name) for name in factors), Column("seeds"), *fmt.make_change_columns(names)]
        chapter.add_table(Table(f"response_{key}", f"{student}: change by setting", columns, own))
    chapter.add_note(fmt.NOTES["response_surface"])
    return chapter


def _list_settings(results: Results) -> list[Record]:
    """Return the effects of arms that change factors only, with their values."""
    config, unset = results["config"], asdict(ArmConfig())
    models = {model["name"]: model for model in results["design"]["models"]}
    arms = {arm["name"]: arm for arm in config["arms"]}
    records: list[Record] = []
    for effect in results["effects"]:
        student, treatment = effect["student"], effect["treatment"]
        arm = {} if treatment == f"{MAIN_EFFECT}{student}" else arms.get(treatment, {"kind": "another source"})
        changed = {name: value for name, value in arm.items() if value != unset[name]}
        if changed.keys() - {"name", "students", *_FACTORS} or changed.get("learning_rate") == 0:
            continue
        own = {name: value for name, value in models[student].items() if value is not None}
        if changed.keys() & {"start_id", "start_text"}:
            own = {name: value for name, value in own.items() if name not in ("start_id", "start_text")}
        settings = {**config["sample"], **config["train"], **own, **changed}
        records.append({**effect, **{name: settings.get(name) for name in _FACTORS}})
    return records


def write_proxies(results: Results) -> Chapter | None:
    """Return the chapter on proxies; None if none were measured."""
    proxies = results["proxies"]
    if proxies is None:
        return None
    measure, reliability = proxies["measure"], proxies["reliability"]
    scale, digits = display_scale(measure), fmt.get_decimals(measure)
    chapter = Chapter("Prediction of the gain by proxies")
    caption = "Proxies and the gain"
    chapter.add_table(_make_relation_table("proxies", caption, proxies["relations"], scale, digits))
    reliable = (
        "With one seed the reliability of the gains is unknown."
        if reliability is None
        else f"The reliability of the gains over seeds (Spearman–Brown) is {reliability:.2f}, which limits the "
        f"correlation of a proxy to about {reliability**0.5:.2f}."
    )
    embedder = results["config"].get("embedding_model")
    semantic = f", semantic similarity of embeddings by {embedder}" if embedder else ""
    chapter.add_note(
        f"{reliable} Rank correlations with the change of {fmt.format_measure(measure)}, centered within students; p "
        "from permutations of the sources, adjusted by Benjamini and Hochberg's method. The 90 % interval counts the "
        "sources. Regret is the loss from choosing each student's source by the proxy instead of the best one. "
        f"Similarity is of TF-IDF vectors{semantic}. Likelihood per token is not comparable across tokenizers. "
        "Gradient alignment is the cosine of the mean gradients of the corpus and of dev documents; probe gain is the "
        "fall of their bits per byte after a few steps on the corpus."
    )
    if by_task := proxies.get("by_task"):
        records = [{**one, "task": part["task"]} for part in by_task for one in part["relations"]]
        records += [{**one, "task": "all tasks"} for one in proxies["over_tasks"]]
        caption = "Similarity to the questions of a task and the gain on this task, by benchmark"
        chapter.add_table(_make_relation_table("proxies_by_task", caption, records, 100, 2, "task"))
        chapter.add_note(
            "Rank correlations with the change of the accuracy of one task, of students whose base is eligible for it. "
            "The p-values are adjusted over all tasks and proxies. The rows of “all tasks” are students × tasks, with "
            "one permutation of the sources for all rows; its p-values are adjusted over the proxies."
        )
    columns = [
        *(*make_columns("student", "source"), Column("seed", convert=str)),
        *(Column(one["name"], path=("proxies", one["name"])) for one in proxies["relations"]),
        Column(
            "change", f"change: {fmt.format_measure(measure)}", digits, scale, signed=True,
            path=("measures", measure, "change", "value"),
        ),
    ]  # fmt: skip
    records = [cell for cell in results["cells"] if cell["proxies"] is not None]
    chapter.add_table(Table("proxies_by_cell", "Proxies of each corpus before training", columns, records))
    return chapter


def _make_relation_table(name: str, caption: str, relations: Records, scale: float, digits: int, *first: str) -> Table:
    columns = [
        *make_columns(*first),
        Column("proxy", path=("name",), convert=lambda name: name.replace("_", " ")),
        *make_columns("verdict", "reason"),
        Column("correlation", "correlation [90 % interval]", 2, signed=True),
        Column("p_adjusted", "adjusted p", p_value=True),
        Column("partial", "partial correlation given source ability", 2, signed=True),
        Column("p_partial", "p", p_value=True),
        Column("without_own", "without own text", 2, signed=True),
        Column("p_without_own", "p", p_value=True),
        *make_columns("cells", "sources"),
        Column("regret", digits=digits, scale=scale),
        Column("random_regret", "regret of a random choice", digits, scale),
    ]
    records = [
        {**one, "correlation": Estimate(one["correlation"], one["low"], one["high"], one["sources"])}
        if one["correlation"] is not None
        else one
        for one in relations
    ]
    return Table(name, caption, columns, records)
