"""Comparison of tasks before and after training, one by one and averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from jax_selftrain.stats import estimators
from jax_selftrain.stats.noninferiority import benjamini_hochberg
from jax_selftrain.study.paired_results import Pair, describe_task


def compare_tasks(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Compare each task before and after.

    `q` is p after Benjamini and Hochberg's correction over the tasks.
    """
    entries = [describe_task(pair) for pair in pairs]
    adjusted = benjamini_hochberg([entry["flips"]["mcnemar_p"] for entry in entries])
    return [entry | {"flips": {**entry["flips"], "q": q}} for entry, q in zip(entries, adjusted, strict=True)]


def macro_change(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Average accuracy, chance-normalized accuracy and log-odds of the right choice over tasks.

    Chance-normalized: (accuracy − chance) / (1 − chance). Log-odds are None if no task has choices.
    """
    chances = np.array([pair.base.chance_accuracy or 0.0 for pair in pairs])
    effects = [estimators.paired_proportion_effect(*pair.right, pair.clusters) for pair in pairs]
    levels = [[pair.right[side].astype(np.float64) for pair in pairs] for side in (0, 1)]
    normed = [[(right - chance) / (1 - chance) for right, chance in zip(side, chances, strict=True)] for side in levels]
    return {
        "tasks": len(pairs),
        "n": sum(pair.base.count for pair in pairs),
        "accuracy": {
            "before": asdict(estimators.macro_mean(levels[0])),
            "after": asdict(estimators.macro_mean(levels[1])),
            "change": asdict(estimators.macro_effect(effects).estimate()),
        },
        "chance_normalized": {
            "before": asdict(estimators.macro_mean(normed[0])),
            "after": asdict(estimators.macro_mean(normed[1])),
            "change": asdict(estimators.macro_effect(effects, 1 / (1 - chances)).estimate()),
        },
        "log_odds": _macro_log_odds(pairs),
    }


def _macro_log_odds(pairs: Sequence[Pair]) -> dict[str, Any] | None:
    both = [
        (old, new)
        for before, after in pairs
        if (old := before.log_odds) is not None and (new := after.log_odds) is not None
    ]
    if not both:
        return None
    sides = {
        "before": [old for old, _ in both],
        "after": [new for _, new in both],
        "change": [new - old for old, new in both],
    }
    return {side: asdict(estimators.macro_mean(values)) for side, values in sides.items()}
