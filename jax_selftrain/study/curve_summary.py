"""Summary of the evaluations during training (`curve.jsonl`) for `results.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

METRIC_KINDS = {"nll": "texts", "acc": "tasks", "exact_match": "sequences", "log_pz": "sequences", "pz": "sequences"}
"""Kind of file, by the last part of a metric's name."""


def summarize_curve(
    curve: Sequence[Mapping[str, float]], measured: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Summarize evaluations; None if there were none.

    Args:
        curve: the lines of `curve.jsonl`.
        measured: `evaluation.measured` of `run.json`.

    Returns:
        `step`, and `measures`: each with `name`, `n` (documents, questions or sequences) and `values`, one a step.
    """
    if not curve:
        return None
    sizes = {
        f"{name}/{kind}": entry["n"]
        for files in measured
        for kind, part in METRIC_KINDS.items()
        for name, entry in files.get(part, {}).items()
    }
    names = [name for name in curve[0] if name != "step"]
    return {
        "step": [line["step"] for line in curve],
        "measures": [{"name": name, "n": sizes[name], "values": [line[name] for line in curve]} for name in names],
    }
