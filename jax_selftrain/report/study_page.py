"""The report of a study: its first screen and its chapters, made from `results.json` and nothing else.

The chapters follow the protocol: the answer, the design, the transfer matrix with the interaction, capability by task
and arm, the key figure (memorization against damage), memorization by class and group, drift of the corpora, samples
that nobody chose, and what this cannot show. Verdicts need claims that were declared beforehand; where a study has
none, the report says so instead of judging.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from jax_selftrain.report.formatting import format_interval, format_signed, label, parse_estimate, zero_note
from jax_selftrain.report.page import Chapter, note_html, render_page
from jax_selftrain.report.study_chapters import study_chapters
from jax_selftrain.report.tables import Column, Table
from jax_selftrain.stats.estimators import Estimate
from jax_selftrain.stats.noninferiority import HEADLINE
from jax_selftrain.study.measure_names import MAIN_EFFECT, main_measure

Results = Mapping[str, Any]
Effects = Sequence[Mapping[str, Any]]


def study_page(results: Results, written: Sequence[Chapter]) -> str:
    """The HTML of a study's report."""
    design, seeds = results["design"], results["config"]["seeds"]
    counts = {
        "source": design["sources"],
        "student": design["students"],
        "arm": results["config"]["arms"],
        "seed": seeds,
    }
    told = ", ".join(f"{len(members)} {name}{'s' * (len(members) != 1)}" for name, members in counts.items())
    kind = f"{told}: {len(results['cells'])} cell{'s' * (len(results['cells']) != 1)}."
    train = results["config"]["train"]
    lead = (
        f"Every student was trained for {_steps(results):,} steps of {train['batch_size']:,} rows on text that a "
        "source wrote from its start token alone, and measured before and after."
    )
    cards = "\n".join(
        f'<div class="card"><h3>{escape(title)}</h3>\n<p class="values">{values}</p>\n<p>{text}</p></div>'
        for title, values, text in _cards(results)
    )
    opening = f'<div class="cards">\n{cards}\n</div>\n<p class="caution">{_caution(results)}</p>'
    return render_page(results["title"], kind, lead, opening, written)


def _steps(results: Results) -> int:
    """Return the training steps of every cell."""
    return next((cell["training"]["steps"] for cell in results["cells"] if cell["training"]), 0)


def transfer_chapters(results: Results) -> list[Chapter]:
    """The chapters that these results have something to say in, in their order."""
    return [_verdicts(results), *study_chapters(results)]


# The first screen -----------------------------------------------------------------------------------------------


def _cards(results: Results) -> Iterator[tuple[str, str, str]]:
    main = main_measure(results)
    for one in results["claims"]:
        yield f"{one['name']} ({_standing(one)})", one["verdict"], _sentence(one)
    for student in results["design"]["students"]:
        own = _find(results["effects"], student, f"{MAIN_EFFECT}{student}")
        if own is not None:
            yield f"{student}, trained on its own text", *_sentence_for(own["measures"][main], main)
    found = results["interaction"]
    if found is not None:
        contrast = parse_estimate(found["measures"][main]["contrast"])
        yield (
            "Home − away: does its own kind's text suit a student better?",
            format_signed(contrast, main),
            f"{label(main)}, 95 % interval over {contrast.n} seeds: {format_interval(contrast, main)}. "
            f"{zero_note(contrast)}",
        )


def _sentence(one: Mapping[str, Any]) -> str:
    told = f"Claimed: {escape(_claim_text(one))}. {escape(one['reason'])}"
    return told[:1].upper() + told[1:]


def _sentence_for(measure: Mapping[str, Any], name: str) -> tuple[str, str]:
    change = parse_estimate(measure["change"])
    over = f"95 % interval over {change.n} seeds: {format_interval(change, name)}. {zero_note(change)}"
    if change.n == 1:
        low, high = measure["one_pair"]
        pair = Estimate(change.value, low, high, measure["items"])
        over = f"One seed: no interval for the recipe; of this one pair over its items: {format_interval(pair, name)}."
    return format_signed(change, name), f"{label(name)}, {measure['items']:,} items or documents. {over}"


def _caution(results: Results) -> str:
    seeds = len(results["config"]["seeds"])
    judged = results["claims"]
    standing = "No claims were declared beforehand, so that there are no verdicts: everything here is exploratory."
    if judged:
        counted = Counter(one["verdict"] for one in judged)
        told = ", ".join(f"{n} {verdict}" for verdict, n in counted.items())
        standing = f"{len(judged)} claim{'s' if len(judged) > 1 else ''}: {told}."
        standing += " Everything else is exploratory."
    if seeds < HEADLINE:
        standing += f" With {seeds} seed{'s' if seeds > 1 else ''}, no claim could be a headline (that takes five)."
    pilots = any(seed < 100 for seed in results["config"]["seeds"])
    return f"<strong>{standing}</strong>" + (" Seeds below 100 are for pilots." if pilots else "")


def _find(effects: Effects, student: str, treatment: str) -> Mapping[str, Any] | None:
    return next((one for one in effects if (one["student"], one["treatment"]) == (student, treatment)), None)


# Verdicts -----------------------------------------------------------------------------------------------------


def _verdicts(results: Results) -> Chapter:
    identical = [cell for cell in results["cells"] if cell["identical"]]
    tables: list[Table] = []
    if not results["claims"]:
        text = (
            "<p>Not tested: the configuration declares no claims. A verdict needs an estimand, a margin and a test "
            "that were fixed before the first run.</p>"
        )
    else:
        columns = (
            Column("claim", "claim"),
            Column("verdict", "verdict"),
            Column("reason", "because"),
            Column("effect", "effect", 4, signed=True),
            Column("margin", "margin", 4),
            Column("seeds", "seeds"),
            Column("p_adjusted", "p, corrected", 3, p_value=True),
            Column("standing", "standing"),
        )
        rows = tuple(
            (
                f"{one['name']}: {_claim_text(one)}",
                one["verdict"],
                one["reason"],
                parse_estimate(one["effect"]) if one["effect"] else None,
                one["margin"],
                one["seeds"],
                one["p_adjusted"],
                _standing(one),
            )
            for one in results["claims"]
        )
        tables.append(Table("verdicts", "Claims and what the rule says of them", columns, rows))
        note = (
            "Effects in the measure's own unit (0.01 is one point of accuracy), with 95 % intervals over seeds. "
            "One-sided tests at .05, corrected by Holm's method where primary, else by Benjamini and Hochberg's."
        )
        text = tables[0].to_html() + note_html(note)
    if identical:
        seeds: dict[tuple[str, str], list[str]] = {}
        for cell in identical:
            seeds.setdefault((cell["student"], cell["treatment"]), []).append(str(cell["seed"]))
        names = "; ".join(f"{student}, {treatment}, seed {', '.join(of)}" for (student, treatment), of in seeds.items())
        text += f"<p>Every measured number is exactly that of the base in: {escape(names)}.</p>"
    return Chapter("Verdicts", text, tuple(tables))


def _standing(one: Mapping[str, Any]) -> str:
    return one["evidence_level"] + (", post hoc" if one["post_hoc"] else "")


def _claim_text(one: Mapping[str, Any]) -> str:
    """The claim in words."""
    who = f" of {one['student']}" if one["student"] else ""
    against = f" more than {one['against']}" if one["comparator"] else ""
    within = f" within {one['margin']:g}" if one["margin"] is not None else ""
    return f"{one['treatment']} {one['direction']} {one['measure']}{who}{against}{within}"
