"""Comparisons as text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jax_selftrain.report.tables import format_interval, format_number
from jax_selftrain.stats.estimators import Estimate

TableRow = Sequence[str]

EVIDENCE_LEVELS = {"none": "too few for a result", "exploration": "exploration, no verdict", "headline": "headline"}

_HEAD = ("", "n", "before", "after", "change, 95 %", "lower limit", "margin", "p", "verdict")


def format_comparison(result: Mapping[str, Any]) -> str:
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
    parts.append(result["pairs"][0]["scope"])
    if recipe := result["recipe"]:
        head = ("", "seeds", "", "", *_HEAD[4:])
        lines = _align([head, *_recipe_rows(recipe)])
        level = EVIDENCE_LEVELS[recipe["evidence_level"]]
        parts.append(f"over {recipe['seeds']} seeds ({level})\n{lines}\n{recipe['scope']}")
    if result["declaration"]["post_hoc"]:
        parts.append("Post hoc: this file already held a comparison of these models with other margins or tasks.")
    return "\n\n".join(parts)


def _pair_rows(pair: Mapping[str, Any]) -> list[TableRow]:
    rows: list[TableRow] = []
    for task in pair["tasks"]:
        levels = (_percent(task["accuracy"][side]["value"]) for side in ("before", "after"))
        changes = _points(task["accuracy"]["change"]), *_decision_rule(task["non_inferiority"], task["p"])
        rows.append((_name(task), f"{task['n']:,}", *levels, *changes))
    if macro := pair["macro"]:
        levels = (_percent(macro[side]) for side in ("before", "after"))
        changes = _points(macro["change"]), *_decision_rule(macro["non_inferiority"], None)
        rows.append((f"macro ({len(macro['tasks'])})", f"{macro['n']:,}", *levels, *changes))
    for text in pair["texts"]:
        bits = text["bits_per_byte"]
        levels = (format_number(bits[side]["value"], 4) for side in ("before", "after"))
        rows.append((text["name"], f"{text['documents']:,}", *levels, _bits(bits["change"]), "", "", "", ""))
    return rows


def _recipe_rows(recipe: Mapping[str, Any]) -> list[TableRow]:
    seeds = f"{recipe['seeds']}"
    rows: list[TableRow] = []
    for entry in [*recipe["tasks"], *([{"name": "macro", **recipe["macro"]}] if recipe["macro"] else [])]:
        cells = _points(entry["change"]), *_decision_rule(entry["non_inferiority"], entry["p"])
        if recipe["evidence_level"] != "headline":
            cells = *cells[:-1], "no verdict"
        rows.append((_name(entry), seeds, "", "", *cells))
    for entry in recipe["texts"]:
        p = "" if entry["p"] is None else _p_value(entry["p"])
        rows.append((entry["name"], seeds, "", "", _bits(entry["change"]), "", "", p, ""))
    return rows


def _name(entry: Mapping[str, Any]) -> str:
    return f"{entry['name']}*" if entry.get("role") == "primary" else entry["name"]


def _decision_rule(rule: Mapping[str, Any] | None, p: float | None) -> tuple[str, str, str, str]:
    """Return lower limit, margin, p-value and verdict of a change."""
    if rule is None:
        return "", "", "", ""
    verdict = rule["verdict"]
    if (corrected := rule.get("verdict_adjusted", verdict)) != verdict:
        verdict += f" ({corrected} after correction)"
    lower = "" if rule["lower"] is None else format_number(rule["lower"], 2, scale=100, signed=True)
    return lower, format_number(-rule["margin"], 2, scale=100, signed=True), "" if p is None else _p_value(p), verdict


def _percent(value: float) -> str:
    return f"{format_number(value, 1, scale=100)} %"


def _p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else format_number(p, 3)


def _points(change: Mapping[str, Any]) -> str:
    return _format_estimate(Estimate(**change), 2, 100)


def _bits(change: Mapping[str, Any]) -> str:
    return _format_estimate(Estimate(**change), 4, 1)


def _format_estimate(estimate: Estimate, digits: int, scale: float) -> str:
    ends = format_interval(estimate, digits, scale=scale, signed=True)
    return f"{format_number(estimate.value, digits, scale=scale, signed=True)} {ends}"


def _align(rows: Sequence[TableRow]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0], cells[-1] = row[0].ljust(widths[0]), row[-1]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
