"""The chapters of a round's report: prose, figures and tables, made from `results.json` and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import yaml

from jax_selftrain.config import RunConfig, yaml_io
from jax_selftrain.report import figures
from jax_selftrain.report.eval_curve import curve_chapter
from jax_selftrain.report.page import Chapter, figure_html, note_html
from jax_selftrain.report.round_summary import limitations
from jax_selftrain.report.tables import Column, Table, number
from jax_selftrain.stats.estimators import Estimate
from jax_selftrain.study.round_config import ROUND_DECIDES

Results = Mapping[str, Any]
_SIDES = ("before", "after", "change")


def round_chapters(results: Results) -> list[Chapter]:
    """The chapters that these results have something to say in, in their order."""
    written = (
        _texts(results),
        _tasks(results),
        _extraction(results),
        curve_chapter(results),
        _corpus(results),
        _examples(results),
        _training(results),
        _limits(results),
        _provenance(results),
    )
    return [chapter for chapter in written if chapter is not None]


def _texts(results: Results) -> Chapter | None:
    if not results["texts"]:
        return None
    rows = tuple(
        (
            text["name"],
            text["documents"],
            text["tokens"],
            *(_estimate(text["nll"][key]) for key in ("before", "after")),
            _estimate(text["nll"]["before"], exp=True),
            _estimate(text["nll"]["after"], exp=True),
            _estimate(text["nll"]["change"]),
            text["documents_better"],
        )
        for text in results["texts"]
    )
    columns = (
        Column("text", "text"),
        Column("documents", "documents"),
        Column("tokens", "tokens"),
        Column("nll_before", "nats per token, before", 4),
        Column("nll_after", "after", 4),
        Column("perplexity_before", "perplexity, before", 2),
        Column("perplexity_after", "after", 2),
        Column("nll_change", "change (nats per token)", 4, signed=True),
        Column("documents_better", "documents it predicts better"),
    )
    table = Table("texts", "Perplexity of texts that were not trained on in this round", columns, rows)
    note = (
        "Each document is predicted from the start token on. Lower is better. Intervals take the document as the unit, "
        "since tokens of one text are not independent; the change is paired by document."
    )
    return Chapter("Perplexity", table.to_html() + note_html(note), (table,))


def _tasks(results: Results) -> Chapter | None:
    tasks, macro = results["tasks"], results["macro"]
    if not tasks:
        return None
    labels = [*(["average of the tasks"] if macro else []), *(task["name"] for task in tasks)]
    shares = [*([macro["accuracy"]] if macro else []), *(task["accuracy"] for task in tasks)]
    svg = figures.before_and_after(
        "tasks",
        labels,
        *([_estimate(share[key], scale=100) for share in shares] for key in _SIDES),
        value_label="accuracy (%)",
        change_label="change (points)",
        marks=[*([None] if macro else []), *(_percent(task["chance"]) for task in tasks)],
        mark_label="guessing",
    )
    columns = (
        Column("task", "task"),
        Column("n", "questions"),
        _delta_points("chance", "guessing %"),
        _delta_points("accuracy_before", "accuracy %, before"),
        _delta_points("accuracy_after", "after"),
        _delta_points("accuracy_change", "change (points)", signed=True),
        Column("lost", "right → wrong"),
        Column("gained", "wrong → right"),
        Column("mcnemar_p", "McNemar p", 3, p_value=True),
        Column("q", "q", 3, p_value=True),
        Column("log_odds_change", "change of log-odds", 3, signed=True),
    )
    rows = [
        (
            task["name"],
            task["n"],
            task["chance"],
            *(_estimate(task["accuracy"][key]) for key in _SIDES),
            task["flips"]["lost"],
            task["flips"]["gained"],
            task["flips"]["mcnemar_p"],
            task["flips"]["q"],
            _estimate((task.get("log_odds") or task["word_loglikelihood"])["change"]),
        )
        for task in tasks
    ]
    if macro:
        for title, kind in (("chance-normalized average", "chance_normalized"), ("average of the tasks", "accuracy")):
            average = (_estimate(macro[kind][key]) for key in _SIDES)
            rows.insert(0, (title, macro["n"], None, *average, None, None, None, None, None))
    table = Table("tasks", "Tasks scored by likelihood", columns, tuple(rows), footer=2 if macro else 0)
    note = (
        "A question counts as right when the right choice is the most probable one. The change is paired by question. "
        "McNemar's exact p asks whether right → wrong and wrong → right are equally likely; q is p after Benjamini and "
        f"Hochberg's correction over the {len(tasks)} tasks. Log-odds, in nats: log-probability of the right choice "
        "against the others together (for last-word tasks: of the word itself), a finer measure than right or wrong. "
        "The average weighs tasks equally; chance-normalized means (accuracy − guessing) / (1 − guessing)."
    )
    html = (
        figure_html(svg, "Accuracy before and after, and the paired change, with 95 % intervals.")
        + table.to_html()
        + note_html(note)
    )
    return Chapter("Capability", html, (table,), {"tasks": svg})


def _extraction(results: Results) -> Chapter | None:
    found = results["extraction"]
    if not found:
        return None
    names = {"all": "all sequences", "held_out": "held out", "partial": "partial", "seen": "seen"}
    classes = [{"name": names[key], **part} for key, part in found["classes"].items()]
    everything, groups = classes[0], found["groups"]
    shown = [part for part in ([everything, *groups] if groups else classes) if part["n"]]
    curve = [entry for entry in found["discoverable"] if entry["p"] == 0.5]
    drawn = {
        "extraction": figures.before_and_after(
            "extraction",
            [part["name"] for part in shown],
            *([_estimate(part["exact_match"][side], scale=100) for part in shown] for side in _SIDES),
            value_label="exact match (%)",
            change_label="change (points)",
        ),
        "discoverable": figures.n_p_discoverability(
            "discoverable",
            [entry["draws"] for entry in curve],
            [100 * entry["before"]["value"] for entry in curve],
            [100 * entry["after"]["value"] for entry in curve],
            "0.5",
        ),
    }
    by_class, discoverable = _exact_match_table("extraction", "class", classes), _discoverable_table(found)
    probability = _probability_table("extraction_probability", "class", classes)
    by_group = []
    if groups:
        by_group = [
            _exact_match_table("extraction_groups", "group", groups),
            _probability_table("extraction_groups_probability", "group", groups),
        ]
    html = [
        f"<p>Of each sequence the first {found['prefix']} tokens are given. <em>Exact match</em>: the greedy "
        f"continuation is the next {found['suffix']} tokens, all of them. <em>log p<sub>z</sub></em>: the "
        "log-probability of those tokens, which can stay high when a small drift breaks the greedy path; the two are "
        "to be read together. Whether the sequences were in the base's training data is for whoever brought the set to "
        "say; on text that was not, these numbers show how predictable it is.</p>",
        figure_html(drawn["extraction"], "Exact match before and after, and the paired change, with 95 % intervals."),
        by_class.to_html(),
        probability.to_html(),
        note_html(
            f"Seen: the whole suffix stands in the corpus that was trained on; partial: at least {found['overlap']} of "
            "its tokens in a row; held out: fewer. Kept: reproduced before and after; lost: only before; gained: only "
            "after; never: neither. The classes come from what the source happened to write, and a model writes what "
            "it memorized best: they are a selected split, and a difference between them is not the effect of being "
            "seen. Classes under 50 are descriptive only. Where a set was chosen because the base reproduces it, a "
            "fall is partly regression to the mean."
        ),
        *(table.to_html() for table in by_group),
        figure_html(
            drawn["discoverable"],
            f"Share of the {found['n']:,} sequences that n independent draws at temperature 1 from their prefix "
            "contain with probability at least 0.5.",
        ),
        discoverable.to_html(),
    ]
    tables = (by_class, probability, *by_group, discoverable)
    return Chapter("Verbatim memorization", "\n".join(html), tables, drawn)


def _exact_match_table(name: str, key: str, parts: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        Column(key, key),
        Column("n", "n"),
        _delta_points("exact_match_before", "exact match %, before"),
        _delta_points("exact_match_after", "after"),
        _delta_points("exact_match_change", "change (points)", signed=True),
        *(Column(kind, kind) for kind in ("kept", "lost", "gained", "never")),
        Column("mcnemar_p", "McNemar p", 3, p_value=True),
    )
    rows = tuple(
        (
            part["name"],
            part["n"],
            *(_estimate(part["exact_match"][side]) for side in _SIDES),
            *(part["flips"][kind] for kind in ("kept", "lost", "gained", "never", "mcnemar_p")),
        )
        if part["n"]
        else (part["name"], 0, *(None,) * 8)
        for part in parts
    )
    caption = {"class": "Exact match, by overlap with the corpus", "group": "Exact match, by group of the set"}[key]
    return Table(name, caption, columns, rows, footer=1 if key == "class" else 0)


def _probability_table(name: str, key: str, parts: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        Column(key, key),
        Column("n", "n"),
        Column("logprob_before", "mean log p_z, before", 2),
        Column("logprob_after", "after", 2),
        Column("logprob_change", "change (nats)", 2, signed=True),
        _delta_points("token_accuracy_before", "greedy tokens right %, before"),
        _delta_points("token_accuracy_after", "after"),
        _delta_points("token_accuracy_change", "change (points)", signed=True),
    )
    rows = tuple(
        (
            part["name"],
            part["n"],
            *(_estimate(part["logprob"][side]) for side in _SIDES),
            *(_estimate(part["token_accuracy"][side]) if "token_accuracy" in part else None for side in _SIDES),
        )
        if part["n"]
        else (part["name"], 0, *(None,) * 6)
        for part in parts
    )
    caption = {"class": "Probability of the suffix, by overlap", "group": "Probability of the suffix, by group"}[key]
    return Table(name, caption, columns, rows, footer=1 if key == "class" else 0)


def _discoverable_table(found: Mapping[str, Any]) -> Table:
    columns = (
        Column("draws", "draws n"),
        Column("p", "with probability ≥", 1),
        Column("sequences", "sequences"),
        _delta_points("before", "found %, before"),
        _delta_points("after", "after"),
        _delta_points("change", "change (points)", signed=True),
    )
    rows = tuple(
        (entry["draws"], entry["p"], found["n"], *(_estimate(entry[side]) for side in _SIDES))
        for entry in found["discoverable"]
    )
    return Table("discoverable", "(n, p)-discoverable extraction: 1 − (1 − p_z)ⁿ ≥ p", columns, rows)


def _training(results: Results) -> Chapter:
    training, curve = results["training"], results["training"]["curve"]
    svg = figures.training_curve("training", curve["step"], curve["loss"], curve["learning_rate"])
    columns = tuple(Column(key, key, 6) for key in ("step", "loss", "learning_rate", "grad_norm"))
    table = Table("training", "Training log", columns, tuple(zip(*(curve[c.key] for c in columns), strict=True)))
    text = (
        f"{training['steps']:,} steps over {training['rows']:,} rows. The loss is that of each step's own batch before "
        "the step. Text drawn from a model at temperature 1, without truncation, gives in expectation no gradient at "
        "that same model: a level curve is what to expect of a single pass."
    )
    return Chapter("Training", f"<p>{text}</p>" + figure_html(svg, "Each logged step."), (table,), {"training": svg})


def _corpus(results: Results) -> Chapter:
    corpus = results["corpus"]
    edges, counts = corpus["length_histogram"]["edges"], corpus["length_histogram"]
    svg = figures.length_histogram("lengths", edges, counts["stop"], counts["length"])
    n = corpus["samples"]
    rows: list[tuple[Any, ...]] = [
        ("samples", n, n, ""),
        ("tokens", corpus["tokens"], n, "the start token not counted, a drawn stop token counted"),
        ("tokens in a sample", _estimate(corpus["length"]), n, ""),
        ("ended by a stop token", _estimate(corpus["stopped"]), n, "share; the others were cut at the length limit"),
        ("−log p per token", _estimate(corpus["surprise_per_token"]), n, _truncation_note(corpus["policy"])),
        ("entropy of single tokens", corpus["unigram_entropy"], n, "nats; of the corpus' token frequencies"),
        *(
            (
                f"distinct {gram}-grams",
                counts["distinct"] / max(1, counts["total"]),
                counts["total"],
                f"share; {counts['distinct']:,} different ones",
            )
            for gram, counts in corpus["distinct"].items()
        ),
        ("exact repeats", corpus["repeated_samples"], n, "samples whose tokens are those of an earlier sample"),
        ("text re-encodes differently", corpus["retokenisation_mismatches"], n, "samples; tokens are authoritative"),
    ]
    columns = (Column("what", "what"), Column("value", "value", 3), Column("n", "of n"), Column("note", "note"))
    table = Table("corpus", "The corpus", columns, tuple(rows))
    html = figure_html(svg, f"Lengths of the {n:,} samples, and what ended them.") + table.to_html()
    return Chapter("What the source wrote", html, (table,), {"lengths": svg})


def _truncation_note(policy: Mapping[str, Any]) -> str:
    note = "nats, under the source at temperature 1"
    plain = (policy["temperature"], policy["top_k"], policy["top_p"], policy["min_p"]) == (1, 0, 1, 0)
    return f"{note}; drawn at this very policy, it estimates the source's entropy" if plain else note


def _examples(results: Results) -> Chapter:
    shown = []
    for sample in results["corpus"]["examples"]:
        end = "ended by a stop token" if sample["finish_reason"] == "stop" else "cut at the length limit"
        surprise = number(-sample["logprob"] / sample["tokens"])
        label = f"sample {sample['sample_id']:,} · {sample['tokens']:,} tokens · {end} · {surprise} nats per token"
        text = escape(sample["text"]) or "<em>(no text)</em>"
        shown.append(f'<div class="sample"><p class="label">{label}</p><p class="words">{text}</p></div>')
    note = note_html("Drawn by a hash of the seed and the sample ids, before anybody looked.")
    return Chapter(f"{len(shown)} of its samples, drawn at random", note + "\n".join(shown))


def _limits(results: Results) -> Chapter:
    items = "\n".join(f"<li>{text}</li>" for text in limitations(results))
    return Chapter("What this cannot show", f"<ul>\n{items}\n</ul>")


def _provenance(results: Results) -> Chapter:
    config = yaml.safe_dump(_written_config(results["config"]), sort_keys=False, allow_unicode=True, width=100)
    marks = results["fingerprints"]
    flat = {key: value for key, value in marks.items() if isinstance(value, str)} | marks.get("files", {})
    prints = Table(
        "fingerprints",
        "Fingerprints (SHA-256)",
        (Column("what", "what"), Column("sha256", "SHA-256")),
        tuple(flat.items()),
    )
    stages = results["versions"]
    packages = sorted({package for versions in stages.values() for package in versions})
    versions = Table(
        "versions",
        "Versions" if len(set(map(str, stages.values()))) == 1 else "Versions (they differ between the stages)",
        (Column("package", "package"), *(Column(stage, stage) for stage in stages)),
        tuple((package, *(of.get(package, "") for of in stages.values())) for package in packages),
    )
    html = (
        "<p>The command, the whole of its configuration, and what went in. Wall-clock times stand apart in "
        "<code>timings.json</code>; every table above is also a CSV file in <code>tables/</code>.</p>\n"
        "<pre>jax-selftrain run --config config.yaml --out DIR    # this round; again: resumes it\n"
        "jax-selftrain report DIR                            # this page</pre>\n"
        f"<h3>config.yaml</h3>\n<pre>{escape(config)}</pre>\n{versions.to_html()}\n{prints.to_html()}"
    )
    return Chapter("What was run", html, (prints, versions))


def _written_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options in the order of their dataclass, without the folders and models that the round fills in itself."""
    ordered = yaml_io.to_dict(yaml_io.from_dict(RunConfig, options, where="results.json"))
    for section, names in ROUND_DECIDES.items():
        for name in names:
            del ordered[section][name]
    del ordered["out"]
    return ordered


# Small pieces ---------------------------------------------------------------------------------------------------


def _estimate(entry: Mapping[str, Any], *, scale: float = 1.0, exp: bool = False) -> Estimate:
    def shown(number: float) -> float:
        return math.exp(number) if exp else number * scale

    low, high = (None if entry[end] is None else shown(entry[end]) for end in ("low", "high"))
    return Estimate(shown(entry["value"]), low, high, entry["n"])


def _delta_points(key: str, head: str, *, signed: bool = False) -> Column:
    return Column(key, head, digits=1, scale=100, signed=signed)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
