"""Relations of proxies to the gain: permutation tests, intervals, verdicts.

Cells are not independent: all students share the sources. Ranks are therefore centered within each student, the null
distribution permutes sources (all students at once), and the interval counts sources. Naive tests over cells call
9–27 % of unrelated proxies significant.

The similarity of a corpus to the questions of one task is related to the gain on this task: for each task, and over all
tasks, whose rows are then students × tasks with one permutation of the sources.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cache, reduce
from operator import getitem
from typing import Any

import numpy as np
import scipy

from jax_selftrain.config import ModelConfig
from jax_selftrain.evals.item_results import ScoreResult
from jax_selftrain.io.rng import make_rng
from jax_selftrain.stats.noninferiority import ALPHA, benjamini_hochberg
from jax_selftrain.study.contrasts import find_relation
from jax_selftrain.study.measure_names import Cells, main_measure

MISSING = 0.3
"""Bound of the 90 % interval of a correlation that is called absent."""
SOURCES_FOR_ABSENCE = 32
"""Sources from which the interval of a correlation of zero is inside the bound."""
PERMUTATIONS = 5_040
"""Number of permutations: all for up to seven sources, else random ones."""
_BLOCK_SIZE = 2**22
"""Permuted gains in memory at once."""

CONFIRMED, REJECTED, INCONCLUSIVE = "related", "unrelated", "cannot tell"

Relations = list[dict[str, Any]]


def relate_proxies(
    cells: Cells,
    models: Mapping[str, ModelConfig],
    students: Sequence[str],
    sources: Sequence[str],
    bases: Mapping[str, ScoreResult],
) -> dict[str, Any] | None:
    """Relate the proxies of the main cells to the gain.

    Returns `measure`, `relations` to its change, `reliability`; and `by_task` and `over_tasks` (`judge_tasks`) of the
    students whose base is eligible for the task. None without proxies.
    """
    matrix = [cell for cell in cells if cell["proxies"] is not None]
    if not matrix:
        return None
    measure, sides = main_measure({"cells": matrix}), (students, sources)
    gains = cell_array(matrix, *sides, "measures", measure, "change", "value")
    if np.isnan(gains).any():
        return None  # with `pairs`, students have different sources
    if measure.startswith("text/"):
        gains = -gains  # fewer bits per byte are a gain
    own = np.array([[find_relation(models[a], models[b], ()) == "self" for b in sources] for a in students])
    means = {name: cell_array(matrix, *sides, "proxies", name).mean(axis=0) for name in matrix[0]["proxies"]}
    abilities = [
        {task: items.acc.mean() for task, items in bases[name].items.items() if items.acc is not None}
        for name in sources
        if name in bases
    ]
    is_known = len(abilities) == len(sources) and bool(abilities[0])
    strength = np.mean([list(one.values()) for one in abilities], axis=1) if is_known else None
    ineligible = {(cell["student"], task["name"]) for cell in matrix for task in cell["tasks"] if task["not_eligible"]}
    by_task: dict[str, TaskProxies] = {}
    for task, measured in matrix[0]["task_proxies"].items():
        is_eligible = np.array([[(student, task) not in ineligible] for student in students])
        if is_eligible.any():
            effects = cell_array(matrix, *sides, "measures", f"task/{task}", "change", "value")
            values = {name: cell_array(matrix, *sides, "task_proxies", task, name).mean(axis=0) for name in measured}
            ability = np.array([one[task] for one in abilities]) if is_known else None
            by_task[task] = values, np.where(is_eligible, effects, np.nan), ability
    return {
        "measure": measure,
        "relations": judge_relations(means, gains, strength, self_mask=own),
        "reliability": reliability(gains),
        **judge_tasks(by_task, self_mask=own),
    }


def judge_relations(
    proxies: Mapping[str, np.ndarray],
    effects: np.ndarray,
    base_ability: np.ndarray | None = None,
    *,
    self_mask: np.ndarray | None = None,
) -> Relations:
    """Judge the relation of each proxy to the gain.

    Args:
        proxies: by name, [students, sources]; NaN where missing.
        effects: change of capability in every cell [seeds, students, sources].
        base_ability: ability of each source before training [sources] or [students, sources]; None: nothing is
            partialled out.
        self_mask: cells of a student with its own text, bool [students, sources].

    Returns per proxy: `correlation`, `p` and `p_adjusted`, `partial` and `p_partial`, `without_own` and its p, the 90 %
    interval `low`, `high`, the `verdict` with its `reason`, the mean `regret` of choosing each student's source by the
    proxy, and `random_regret` of a random choice. Undefined numbers are None.
    """
    found = _test_relations(proxies, effects, base_ability, self_mask)
    _judge_family(found, has_own=self_mask is not None and bool(self_mask.any()))
    return found


TaskProxies = tuple[Mapping[str, np.ndarray], np.ndarray, np.ndarray | None]
"""`proxies`, `effects` and `base_ability` of a task as in `judge_relations`; effects may be NaN."""


def judge_tasks(tasks: Mapping[str, TaskProxies], *, self_mask: np.ndarray | None = None) -> dict[str, Any]:
    """Judge the relation of each proxy to the gain on each task.

    Returns `by_task`: by task, `task` and its `relations`, with p-values adjusted over all tasks and proxies; and
    `over_tasks`: one relation of each proxy, over the rows of all tasks.
    """
    has_own = self_mask is not None and bool(self_mask.any())
    relations = {
        task: _test_relations(proxies, effects, ability, self_mask)
        for task, (proxies, effects, ability) in tasks.items()
    }
    _judge_family([one for found in relations.values() for one in found], has_own=has_own)
    by_task = [{"task": task, "relations": found} for task, found in relations.items()]
    if not tasks:
        return {"by_task": by_task, "over_tasks": []}
    parts = list(tasks.values())
    values = {name: np.concatenate([proxies[name] for proxies, _, _ in parts]) for name in parts[0][0]}
    known = [np.broadcast_to(ability, effects.shape[1:]) for _, effects, ability in parts if ability is not None]
    over_tasks = judge_relations(
        values,
        np.concatenate([effects for _, effects, _ in parts], axis=1),
        np.concatenate(known) if len(known) == len(parts) else None,
        self_mask=None if self_mask is None else np.tile(self_mask, (len(parts), 1)),
    )
    return {"by_task": by_task, "over_tasks": over_tasks}


def _test_relations(
    proxies: Mapping[str, np.ndarray],
    effects: np.ndarray,
    base_ability: np.ndarray | None,
    self_mask: np.ndarray | None,
) -> Relations:
    mean = effects.mean(axis=0)
    found: Relations = []
    for name, values in proxies.items():
        whole = _permutation_test(values, mean)
        partial = (None, None) if base_ability is None else _permutation_test(values, mean, base_ability)
        others: tuple[float | None, float | None] = None, None
        if self_mask is not None:  # an own gain would spoil the null distribution of the other cells
            others = _permutation_test(np.where(self_mask, np.nan, values), np.where(self_mask, np.nan, mean))
        known = np.isfinite(values) & np.isfinite(mean)
        sources = int(known.any(axis=0).sum())
        columns = {
            ("correlation", "p"): whole,
            ("partial", "p_partial"): partial,
            ("without_own", "p_without_own"): others,
            ("low", "high"): _interval(whole[0], sources),
            ("regret", "random_regret"): _selection_regret(values, mean),
        }
        found.append({"name": name, "cells": int(known.sum()), "sources": sources, "p_adjusted": None})
        found[-1]["has_ability"] = base_ability is not None
        for keys, pair in columns.items():
            found[-1] |= zip(keys, pair, strict=True)
    return found


def _judge_family(found: Relations, *, has_own: bool) -> None:
    """Adjust the p-values of a family, and add the verdicts."""
    testable = [one for one in found if one["p"] is not None]
    for one, adjusted in zip(testable, benjamini_hochberg([one["p"] for one in testable]), strict=True):
        one["p_adjusted"] = adjusted
    for one in found:
        one["verdict"], one["reason"] = _judge(one, has_own=has_own)


def reliability(gains: np.ndarray) -> float | None:
    """Estimate the reliability of the seed-averaged gains (Spearman–Brown).

    Args:
        gains: [seeds, students, sources].

    Returns the reliability, from the mean correlation between seeds of gains centered within students. None for one
    seed or constant gains.
    """
    flat = (gains - gains.mean(axis=2, keepdims=True)).reshape(len(gains), -1)
    if len(flat) < 2 or not np.all(flat.std(axis=1) > 0):
        return None
    between = np.corrcoef(flat)[np.triu_indices(len(flat), 1)].mean()
    return float(len(flat) * between / (1 + (len(flat) - 1) * between)) if between > 0 else 0.0


def _permutation_test(
    proxy: np.ndarray, gain: np.ndarray, strength: np.ndarray | None = None
) -> tuple[float | None, float | None]:
    """Return the rank correlation within students and its permutation p-value.

    With `strength`, the ranks of both are residualized, and the residuals of the gain are permuted (Freedman and Lane).
    """
    known = np.isfinite(proxy) & np.isfinite(gain)
    rows, sources = known.any(axis=1), gain.shape[1]
    if sources < 3 or not rows.any():
        return None, None
    if strength is not None:
        strength = np.broadcast_to(strength, gain.shape)[rows]
    proxy, gain, known, orders = proxy[rows], gain[rows], known[rows], _orders(sources)
    blocks = np.array_split(orders, -(-orders.size * len(gain) // _BLOCK_SIZE))
    if strength is None and known.all():
        one, rest = _centered_ranks(proxy, known), _centered_ranks(gain, known)
        correlations = [_correlation(one, np.moveaxis(rest[:, block], 1, 0)) for block in blocks]
    elif strength is None:  # ranks among the cells where both are known
        correlations = []
        for block in blocks:
            permuted = np.moveaxis(gain[:, block], 1, 0)
            valid = np.isfinite(proxy) & np.isfinite(permuted)
            correlations.append(_correlation(_centered_ranks(proxy, valid), _centered_ranks(permuted, valid)))
    else:
        one, rest, held = (_centered_ranks(values, known) for values in (proxy, gain, strength))
        one, rest = _residualize(one, held), _residualize(rest, held)
        correlations = [
            _correlation(one, _residualize(np.where(known, np.moveaxis(rest[:, block], 1, 0), 0.0), held))
            for block in blocks
        ]
    r = np.concatenate(correlations)
    if not np.isfinite(r[0]):
        return None, None
    reached = np.abs(r[np.isfinite(r)]) >= abs(r[0]) - 1e-9
    return float(r[0]), float(reached.mean())


@cache
def _orders(sources: int) -> np.ndarray:
    """Return permutations of the sources [P, sources], the identity first."""
    if math.factorial(sources) <= PERMUTATIONS:
        return np.array([*itertools.permutations(range(sources))])
    rng = make_rng("permutations of sources", sources)
    drawn = rng.permuted(np.tile(np.arange(sources), (PERMUTATIONS - 1, 1)), axis=1)
    return np.concatenate([np.arange(sources)[None], drawn])


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Correlate centered ranks over the last two axes."""
    squares = np.sum(one**2, axis=(-2, -1)) * np.sum(other**2, axis=(-2, -1))
    defined = squares > 1e-9
    product = np.sum(one * other, axis=(-2, -1))
    return np.where(defined, product / np.sqrt(np.where(defined, squares, 1.0)), np.nan)


def _residualize(ranks: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Subtract the regression of centered ranks on others."""
    size = float(np.sum(held**2))
    return ranks - held * (np.sum(ranks * held, axis=(-2, -1), keepdims=True) / size) if size else ranks


def _centered_ranks(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return mid-ranks among valid values minus their mean [… sources]; 0 elsewhere."""
    ranks = scipy.stats.rankdata(np.where(valid, values, np.inf), axis=-1)
    return np.where(valid, ranks - (valid.sum(axis=-1, keepdims=True) + 1) / 2, 0.0)


def _interval(r: float | None, sources: int) -> tuple[float | None, float | None]:
    """Return the 90 % interval of a correlation by Fisher's z."""
    if r is None or sources < 4 or abs(r) > 1 - 1e-9:
        return None, None
    center = math.atanh(r)
    half = float(scipy.stats.norm.ppf(0.95)) / math.sqrt(sources - 3)
    return math.tanh(center - half), math.tanh(center + half)


def _selection_regret(promise: np.ndarray, gain: np.ndarray) -> tuple[float | None, float | None]:
    """Return the mean regret of choosing by the proxy, and at random.

    Of sources with the same proxy, one is chosen at random.
    """
    known = np.isfinite(promise) & np.isfinite(gain)
    rows = [(p[members], g[members]) for p, g, members in zip(promise, gain, known, strict=True) if members.any()]
    if not rows:
        return None, None
    regret, random = zip(*((g.max() - g[p == p.max()].mean(), g.max() - g.mean()) for p, g in rows), strict=True)
    return float(np.mean(regret)), float(np.mean(random))


def _judge(one: Mapping[str, Any], *, has_own: bool) -> tuple[str, str]:
    if one["p_adjusted"] is None:
        return INCONCLUSIVE, "there are fewer than three sources, or nothing varies."
    if one["p_adjusted"] <= ALPHA:
        problems = {
            "it correlates negatively with the gain.": one["correlation"] < 0,
            "it correlates with the gain, but so does the base ability of the sources.": one["has_ability"]
            and not _is_small(one["p_partial"]),
            "without the students' own texts it does not correlate with the gain.": has_own
            and not (_is_small(one["p_without_own"]) and one["without_own"] > 0),
        }
        for problem, is_present in problems.items():
            if is_present:
                return INCONCLUSIVE, problem
        checks = [
            *(["without own texts"] if has_own else []),
            *(["at equal base ability of the sources"] if one["has_ability"] else []),
        ]
        return CONFIRMED, f"it correlates with the gain{', also ' if checks else ''}{' and '.join(checks)}."
    if one["low"] is not None and one["low"] > -MISSING and one["high"] < MISSING:
        return REJECTED, f"the 90 % interval is inside ±{MISSING:g}."
    return INCONCLUSIVE, f"{one['sources']} sources are too few for this correlation."


def _is_small(p: float | None) -> bool:
    return p is not None and p <= ALPHA


def cell_array(cells: Cells, students: Sequence[str], sources: Sequence[str], *path: str) -> np.ndarray:
    """Return a number of every cell [seeds, students, sources], or NaN."""
    found = {(cell["seed"], cell["student"], cell["source"]): reduce(getitem, path, cell) for cell in cells}
    seeds = dict.fromkeys(cell["seed"] for cell in cells)
    return np.array(
        [[[found.get((seed, student, source)) for source in sources] for student in students] for seed in seeds],
        np.float64,
    )
