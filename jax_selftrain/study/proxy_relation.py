"""The relation between proxies and gains over the main cells.

Cells are not independent: all students share the sources. Ranks are therefore centered within each student, the null
distribution permutes sources (all students at once), and the interval counts sources. Naive tests over cells call
9–27 % of unrelated proxies significant.

**Related**: the permutation test is below .05 after Benjamini and Hochberg's correction over the proxies, and below .05
with the sources' base ability partialled out. **Unrelated**: the 90 % interval is inside ±0.3, which takes many
sources. Otherwise **cannot tell**.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import getitem
from typing import Any

import numpy as np
import scipy

from jax_selftrain.io.rng import make_rng
from jax_selftrain.stats.noninferiority import benjamini_hochberg
from jax_selftrain.study.measure_names import Cells

ALPHA = 0.05
MISSING = 0.3
"""Bound of the 90 % interval of a correlation that is called absent."""
PERMUTATIONS = 5_040
"""Number of permutations: all for up to seven sources, else random ones."""

CONFIRMED, REJECTED, INCONCLUSIVE = "related", "unrelated", "cannot tell"


def judge_relations(
    proxies: Mapping[str, np.ndarray],
    effects: np.ndarray,
    base_ability: np.ndarray | None = None,
    *,
    self_mask: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Judge the relation of each proxy to the gain.

    Args:
        proxies: by name, [students, sources]; NaN where missing.
        effects: change of capability in every cell [seeds, students, sources].
        base_ability: ability of each source before training [sources]; None: nothing is partialled out.
        self_mask: cells of a student with its own text, bool [students, sources].

    Returns:
        Per proxy: `correlation`, `p` and `p_adjusted`, `partial` and `p_partial`, `without_own` and its p, the 90 %
        interval `low`, `high`, the `verdict` with its `reason`, the mean `regret` of choosing each student's source
        by the proxy, and `random_regret` of a random choice. Undefined numbers are None.
    """
    mean = effects.mean(axis=0)
    found: list[dict[str, Any]] = []
    for name, values in proxies.items():
        whole = _permutation_test(values, mean)
        partial = whole if base_ability is None else _permutation_test(values, mean, base_ability)
        others = (None, None) if self_mask is None else _permutation_test(np.where(self_mask, np.nan, values), mean)
        columns = {
            ("correlation", "p"): whole,
            ("partial", "p_partial"): partial,
            ("without_own", "p_without_own"): others,
            ("low", "high"): _interval(whole[0], mean.shape[1]),
            ("regret", "random_regret"): _selection_regret(values, mean),
        }
        cells = int(np.sum(np.isfinite(values) & np.isfinite(mean)))
        found.append({"name": name, "cells": cells, "sources": mean.shape[1], "p_adjusted": None})
        for keys, pair in columns.items():
            found[-1] |= zip(keys, pair, strict=True)
    testable = [one for one in found if one["p"] is not None]
    for one, adjusted in zip(testable, benjamini_hochberg([one["p"] for one in testable]), strict=True):
        one["p_adjusted"] = adjusted
    for one in found:
        one["verdict"], one["reason"] = _judge(one)
    return found


def reliability(gains: np.ndarray) -> float | None:
    """Estimate the reliability of the seed-averaged gains (Spearman–Brown).

    Args:
        gains: [seeds, students, sources].

    Returns:
        The reliability, from the mean correlation between seeds of gains centered within students. None for one seed
        or constant gains.
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
    sources = gain.shape[1]
    if sources < 3:
        return None, None
    known = np.isfinite(proxy) & np.isfinite(gain)
    orders = _orders(sources)
    if strength is None:
        permuted = np.moveaxis(gain[:, orders], 1, 0)
        valid = np.isfinite(proxy) & np.isfinite(permuted)
        r = _correlation(_centered_ranks(proxy, valid), _centered_ranks(permuted, valid))
    else:
        one, rest, held = (
            _centered_ranks(np.broadcast_to(values, gain.shape), known) for values in (proxy, gain, strength)
        )
        one, rest = _residualize(one, held), _residualize(rest, held)
        r = _correlation(one, _residualize(np.where(known, np.moveaxis(rest[:, orders], 1, 0), 0.0), held))
    if not np.isfinite(r[0]):
        return None, None
    reached = np.abs(r[np.isfinite(r)]) >= abs(r[0]) - 1e-9
    return float(r[0]), float(reached.mean())


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
    if r is None or sources < 4:
        return None, None
    center = math.atanh(max(-1 + 1e-9, min(1 - 1e-9, r)))
    half = float(scipy.stats.norm.ppf(0.95)) / math.sqrt(sources - 3)
    return math.tanh(center - half), math.tanh(center + half)


def _selection_regret(promise: np.ndarray, gain: np.ndarray) -> tuple[float | None, float | None]:
    """Return the mean regret of choosing by the proxy, and at random."""
    known = np.isfinite(promise) & np.isfinite(gain)
    rows = [(p[members], g[members]) for p, g, members in zip(promise, gain, known, strict=True) if members.any()]
    if not rows:
        return None, None
    regret, random = zip(*((g.max() - g[np.argmax(p)], g.max() - g.mean()) for p, g in rows), strict=True)
    return float(np.mean(regret)), float(np.mean(random))


def _judge(one: Mapping[str, Any]) -> tuple[str, str]:
    if one["p_adjusted"] is None:
        return INCONCLUSIVE, "there are fewer than three sources, or nothing varies."
    if one["p_adjusted"] <= ALPHA:
        if one["p_partial"] is not None and one["p_partial"] <= ALPHA:
            return CONFIRMED, "it correlates with the gain, also at equal base ability of the sources."
        return INCONCLUSIVE, "it correlates with the gain, but so does the base ability of the sources."
    if one["low"] is not None and one["low"] > -MISSING and one["high"] < MISSING:
        return REJECTED, f"the 90 % interval is inside ±{MISSING:g}."
    return INCONCLUSIVE, f"{one['sources']} sources are too few for this correlation."


def cell_array(cells: Cells, students: Sequence[str], sources: Sequence[str], *path: str) -> np.ndarray:
    """Return a number of every cell [seeds, students, sources], or NaN."""
    found = {(cell["seed"], cell["student"], cell["source"]): reduce(getitem, path, cell) for cell in cells}
    seeds = dict.fromkeys(cell["seed"] for cell in cells)
    return np.array(
        [[[found.get((seed, student, source)) for source in sources] for student in students] for seed in seeds],
        np.float64,
    )
