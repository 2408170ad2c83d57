"""Does a proxy foretell the gain? Asked of the matrix as what it is: few sources, each shared by all students.

Cells are no independent draws: a source has its proxies and its gains with every student. Hence ranks are taken and
centered within each student, the null distribution comes from permuting the sources (all students' columns at once),
and an interval counts the sources, not the cells. Naive tests over cells call 9–27 % of unrelated proxies significant.

The verdict is by rule. **Related**: the permutation test is below .05 after Benjamini and Hochberg's correction over
the proxies, and still is below .05 when the sources' strength is partialled out. **Unrelated**: the 90 % interval lies
inside ±0.3, which takes many sources. All else is **cannot tell**.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy

from jax_selftrain.io.rng import make_rng
from jax_selftrain.stats.noninferiority import benjamini_hochberg

ALPHA = 0.05
MISSING = 0.3
"""A correlation is called absent if its 90 % interval lies within this on both sides of zero."""
PERMUTATIONS = 5_040
"""All permutations of up to seven sources; of more, this many random ones."""

CONFIRMED, REJECTED, INCONCLUSIVE = "related", "unrelated", "cannot tell"


def judge_relations(
    proxies: Mapping[str, np.ndarray],
    effects: np.ndarray,
    base_ability: np.ndarray | None = None,
    *,
    self_mask: np.ndarray | None = None,
    directions: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """What each proxy has to do with the gain.

    Args:
        proxies: by name, [students, sources]; NaN where there is none.
        gains: [seeds, students, sources]: the change of capability in every cell.
        strength: [sources]: what each source itself can do; unset: nothing is partialled out.
        own: bool [students, sources]: the cells in which a student reads its own text.
        directions: by proxy, 1 or −1: which way it is said to point; unset: 1.

    Returns:
        Per proxy: `correlation`, `p` and `p_adjusted`, `partial` and `p_partial`, `without_own` and its p, the 90 %
        interval `low`, `high`, the `verdict` with its `reason`, the mean `regret` of choosing each student's source
        by the proxy, and `random_regret`, of choosing it by lot. Numbers are None where they are undefined.
    """
    mean = effects.mean(axis=0)
    found = []
    for name, values in proxies.items():
        r, p = _tested(values, mean)
        partial, p_partial = (r, p) if base_ability is None else _tested(values, mean, base_ability)
        without, p_without = (None, None) if self_mask is None else _tested(np.where(self_mask, np.nan, values), mean)
        low, high = _interval(r, mean.shape[1])
        regret, by_lot = _selection_regret(values * (directions or {}).get(name, 1), mean)
        found.append(
            {
                "name": name,
                "cells": int(np.sum(np.isfinite(values) & np.isfinite(mean))),
                "sources": mean.shape[1],
                "correlation": r,
                "p": p,
                "partial": partial,
                "p_partial": p_partial,
                "without_own": without,
                "p_without_own": p_without,
                "low": low,
                "high": high,
                "regret": regret,
                "random_regret": by_lot,
            }
        )
    testable = [one for one in found if one["p"] is not None]
    for one, adjusted in zip(testable, benjamini_hochberg([one["p"] for one in testable]), strict=True):
        one["p_adjusted"] = adjusted
    for one in found:
        one.setdefault("p_adjusted", None)
        one["verdict"], one["reason"] = _judge(one)
    return found


def reliability(gains: np.ndarray) -> float | None:
    """How well the mean over seeds of each cell's gain would agree with that of other seeds (Spearman–Brown).

    From the mean correlation between seeds of the gains centered within each student, [seeds, students, sources]; None
    of one seed, or where nothing varies.
    """
    centered = gains - gains.mean(axis=2, keepdims=True)
    flat = centered.reshape(len(gains), -1)
    if len(flat) < 2 or not np.all(flat.std(axis=1) > 0):
        return None
    between = np.corrcoef(flat)[np.triu_indices(len(flat), 1)].mean()
    return float(len(flat) * between / (1 + (len(flat) - 1) * between)) if between > 0 else 0.0


def _tested(
    proxy: np.ndarray, gain: np.ndarray, strength: np.ndarray | None = None
) -> tuple[float | None, float | None]:
    """Rank correlation within students, and the share of permutations of the sources that reach its size.

    With `strength`, what the ranks of both have in common with it is taken away, and what is left of the gain is
    permuted (Freedman and Lane): gains permuted as they are would no longer go with the strength.
    """
    sources = gain.shape[1]
    if sources < 3:
        return None, None
    whole = np.isfinite(proxy) & np.isfinite(gain)
    orders = _orders(sources)
    one, rest = _centred_ranks(proxy, whole), _centred_ranks(gain, whole)
    if strength is not None:
        held = _centred_ranks(np.broadcast_to(strength, gain.shape), whole)
        one, rest = _residualize(one, held), _residualize(rest, held)
        r = _correlation(one, _residualize(np.where(whole, np.moveaxis(rest[:, orders], 1, 0), 0.0), held))
    elif whole.all():  # ranks move with their sources
        r = _correlation(one, np.moveaxis(rest[:, orders], 1, 0))
    else:
        r = np.array([_masked(proxy, gain[:, order]) for order in orders])
    if not np.isfinite(r[0]):
        return None, None
    reached = np.abs(r[np.isfinite(r)]) >= abs(r[0]) - 1e-9
    return float(r[0]), float(reached.mean())


def _orders(sources: int) -> np.ndarray:
    """[P, sources]: orders of the sources, the given one first."""
    if math.factorial(sources) <= PERMUTATIONS:
        return np.array([*itertools.permutations(range(sources))])
    rng = make_rng("permutations of sources", sources)
    drawn = rng.permuted(np.tile(np.arange(sources), (PERMUTATIONS - 1, 1)), axis=1)
    return np.concatenate([np.arange(sources)[None], drawn])


def _masked(proxy: np.ndarray, gain: np.ndarray) -> float:
    valid = np.isfinite(proxy) & np.isfinite(gain)
    return float(_correlation(_centred_ranks(proxy, valid), _centred_ranks(gain, valid)))


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of what is centered already, over students and sources (the last two axes); NaN where one is constant."""
    squares = np.sum(one**2, axis=(-2, -1)) * np.sum(other**2, axis=(-2, -1))
    defined = squares > 1e-9
    product = np.sum(one * other, axis=(-2, -1))
    return np.where(defined, product / np.sqrt(np.where(defined, squares, 1.0)), np.nan)


def _residualize(ranks: np.ndarray, held: np.ndarray) -> np.ndarray:
    """What is left of centered ranks when their regression on others is taken away."""
    size = float(np.sum(held**2))
    return ranks - held * (np.sum(ranks * held, axis=(-2, -1), keepdims=True) / size) if size else ranks


def _centred_ranks(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[…, sources]: mid-ranks among the valid ones, minus their mean; 0 where not valid."""
    known = np.where(valid, values, 0.0)
    below = known[..., None, :] < known[..., :, None]
    equal = known[..., None, :] == known[..., :, None]
    ranks = np.sum((below + 0.5 * equal) * valid[..., None, :], axis=-1)
    count = np.maximum(valid.sum(axis=-1, keepdims=True), 1)
    return np.where(valid, ranks - np.sum(ranks * valid, axis=-1, keepdims=True) / count, 0.0)


def _interval(r: float | None, sources: int) -> tuple[float | None, float | None]:
    """90 % interval of a correlation by Fisher's z, the sources being the sample."""
    if r is None or sources < 4:
        return None, None
    center = math.atanh(max(-1 + 1e-9, min(1 - 1e-9, r)))
    half = float(scipy.stats.norm.ppf(0.95)) / math.sqrt(sources - 3)
    return math.tanh(center - half), math.tanh(center + half)


def _selection_regret(promise: np.ndarray, gain: np.ndarray) -> tuple[float | None, float | None]:
    """Mean over students of the best gain minus that of the most promising source, and of one drawn by lot."""
    lost, by_lot = [], []
    for promised, gained in zip(promise, gain, strict=True):
        known = np.isfinite(promised) & np.isfinite(gained)
        if known.any():
            lost.append(gained[known].max() - gained[known][np.argmax(promised[known])])
            by_lot.append(gained[known].max() - gained[known].mean())
    return (float(np.mean(lost)), float(np.mean(by_lot))) if lost else (None, None)


def _judge(one: Mapping[str, Any]) -> tuple[str, str]:
    if one["p_adjusted"] is None:
        return INCONCLUSIVE, "there are fewer than three sources, or nothing varies."
    if one["p_adjusted"] <= ALPHA:
        if one["p_partial"] is not None and one["p_partial"] <= ALPHA:
            return CONFIRMED, "it goes with the gain, also at equal strength of the sources."
        return INCONCLUSIVE, "it goes with the gain, but so does the strength of the sources."
    if one["low"] is not None and one["low"] > -MISSING and one["high"] < MISSING:
        return REJECTED, f"the 90 % interval lies inside ±{MISSING:g}."
    return INCONCLUSIVE, f"{one['sources']} sources are too few for what there is."


def cell_arrays(
    cells: Sequence[Mapping[str, Any]], students: Sequence[str], sources: Sequence[str], measure: str
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Proxies (mean over seeds), gains by seed, and which cells are a student's own, from the cells of a matrix."""
    seeds = list(dict.fromkeys(cell["seed"] for cell in cells))
    names = list(cells[0]["proxies"])
    gains = np.full((len(seeds), len(students), len(sources)), np.nan)
    values = {name: np.full(gains.shape, np.nan) for name in names}
    for cell in cells:
        at = seeds.index(cell["seed"]), students.index(cell["student"]), sources.index(cell["source"])
        if measure in cell["measures"]:
            gains[at] = cell["measures"][measure]["change"]["value"]
        for name in names:
            if cell["proxies"][name] is not None:
                values[name][at] = cell["proxies"][name]
    own = np.array([[source == student for source in sources] for student in students])
    return {name: array.mean(axis=0) for name, array in values.items()}, gains, own
