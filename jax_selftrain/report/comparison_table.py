"""Comparisons and effects as text for the terminal."""

from collections.abc import Iterator, Sequence

from jax_selftrain.report.formatting import (
    Record,
    format_interval,
    format_measure,
    format_number,
    get_decimals,
    parse_change,
)
from jax_selftrain.stats.estimators import Estimate
from jax_selftrain.study.measure_names import common_measures, main_measure

EVIDENCE_LEVELS = {"none": "too few for a result", "exploration": "exploration, no verdict", "headline": "headline"}

_MAX_EFFECTS = 40
_HEAD = ("", "n", "before", "after", "change, 95 %", "lower limit", "margin", "p", "verdict")


def format_comparison(result: Record) -> str:
    """Format a result of `compare`, with one line per task and text.

    Accuracies are in %, their changes in points, texts in bits per byte.
    """
    parts = []
    for i, pair in enumerate(result["pairs"]):
        title = f"{pair['base']['model']} → {pair['student']['model']}"
        parts.append(f"{title}\n{_align([_HEAD, *_pair_rows(pair)])}")
        if i == 0 and (ineligible := [task for task in pair["tasks"] if task["not_eligible"]]):
            reasons = "; ".join(f"{task['name']}: {task['not_eligible']}" for task in ineligible)
            parts[-1] += f"\nnot in the macro average: {reasons}"
    if left_out := result["not_compared"]:
        parts.append("not compared: " + "; ".join(f"{name}: {reason}" for name, reason in left_out.items()))
    parts.append(result["pairs"][0]["scope"])
    if recipe := result["recipe"]:
        head = ("", "seeds", "", "", *_HEAD[4:])
        lines = _align([head, *_recipe_rows(recipe)])
        level = EVIDENCE_LEVELS[recipe["evidence_level"]]
        parts.append(f"over {recipe['seeds']} seeds ({level})\n{lines}\n{recipe['scope']}")
    if result["declaration"]["post_hoc"]:
        parts.append("Post hoc: this file already held a comparison of these models with other margins or tasks.")
    return "\n\n".join(parts)


def format_effects(results: Record) -> str:
    """Format the effects of a study by treatment, and its verdicts."""
    effects = results["effects"]
    texts = [name for name in common_measures(effects) if name.startswith("text/")][:1]
    chosen = [main_measure(results), "exact_match", *texts]
    measures = [name for name in dict.fromkeys(chosen) if name in common_measures(effects)]
    rows = [["student", "treatment", "seeds", *map(format_measure, measures), ""]]
    for effect in effects[:_MAX_EFFECTS]:
        cells = [effect["student"], effect["treatment"], f"{len(effect['seeds'])}"]
        for name in measures:
            change, digits = parse_change(effect["measures"][name], name), get_decimals(name)
            number = format_number(change.value, digits, signed=True)
            cells.append(f"{number} {format_interval(change, digits, signed=True)}")
        rows.append([*cells, ""])
    lines = ["change after training, 95 % interval", _align(rows, 2)]
    if len(effects) > _MAX_EFFECTS:
        lines.append(f"and {len(effects) - _MAX_EFFECTS} more in the report")
    return "\n".join([*lines, *(f"{claim['verdict']}: {claim['name']}" for claim in results["claims"])])


def _pair_rows(pair: Record) -> Iterator[Sequence[str]]:
    for task in pair["tasks"]:
        levels = [task["accuracy"][side]["value"] for side in ("before", "after")]
        yield _task_row(task, task["n"], levels, task["accuracy"]["change"], task["p"])
    if macro := pair["macro"]:
        named = {**macro, "name": f"macro ({len(macro['tasks'])})"}
        yield _task_row(named, macro["n"], [macro["before"], macro["after"]], macro["change"], None)
    for text in pair["texts"]:
        bits = text["bits_per_byte"]
        levels = [format_number(bits[side]["value"], 4) for side in ("before", "after")]
        yield (text["name"], f"{text['documents']:,}", *levels, _format_estimate(bits["change"], 4, 1), "", "", "", "")


def _recipe_rows(recipe: Record) -> Iterator[Sequence[str]]:
    seeds = recipe["seeds"]
    for entry in [*recipe["tasks"], *([{"name": "macro", **recipe["macro"]}] if recipe["macro"] else [])]:
        row = _task_row(entry, seeds, [], entry["change"], entry["p"])
        yield row if recipe["evidence_level"] == "headline" else [*row[:-1], "no verdict"]
    for text in recipe["texts"]:
        change, p = _format_estimate(text["change"], 4, 1), _p_value(text["p"])
        yield text["name"], f"{seeds}", "", "", change, "", "", p, ""


def _task_row(entry: Record, n: int, levels: Sequence[float], change: Record, p: float | None) -> Sequence[str]:
    """Return name, n, levels, change, lower limit, margin, p-value and verdict."""
    name = f"{entry['name']}*" if entry.get("role") == "primary" else entry["name"]
    shown = [f"{format_number(level, 1, scale=100)} %" for level in levels] or ["", ""]
    cells = [name, f"{n:,}", *shown, _format_estimate(change, 2, 100)]
    rule = entry["non_inferiority"]
    if rule is None:
        return [*cells, "", "", "", ""]
    verdict = rule["verdict"]
    if (corrected := rule.get("verdict_adjusted", verdict)) != verdict:
        verdict += f" ({corrected} after correction)"
    lower = "" if rule["lower"] is None else format_number(rule["lower"], 2, scale=100, signed=True)
    return [*cells, lower, format_number(-rule["margin"], 2, scale=100, signed=True), _p_value(p), verdict]


def _p_value(p: float | None) -> str:
    if p is None:
        return ""
    return "<0.001" if p < 0.001 else format_number(p, 3)


def _format_estimate(entry: Record, digits: int, scale: float) -> str:
    ends = format_interval(Estimate(**entry), digits, scale=scale, signed=True)
    return f"{format_number(entry['value'], digits, scale=scale, signed=True)} {ends}"


def _align(rows: Sequence[Sequence[str]], names: int = 1) -> str:
    """Align columns; the first `names` to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        for i in range(names):
            cells[i] = row[i].ljust(widths[i])
        cells[-1] = row[-1]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
