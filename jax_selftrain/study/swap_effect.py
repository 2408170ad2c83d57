"""The causal effect of being in the corpus, by swapped corpora.

A model emits what it memorized best, so sequences in its corpus are better memorized before training: seen − held-out
within one student is confounded by this selection. Seeds have different corpora. For seeds X and Y, chance decides that
the sequences of X∖Y are in one corpus only, and

    ½ [ mean over X∖Y of (student of X − student of Y)  +  mean over Y∖X of (student of Y − student of X) ]

compares every sequence with itself. Equal weights of both directions cancel a difference between the students. The
estimate is the mean over all pairs of seeds; its standard error is over sequences and speaks of these students.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from jax_selftrain.stats.estimators import Effect, Estimate

SEEN, HELD_OUT = "seen", "held_out"
DESCRIPTIVE = 50
"""Minimum number of sequences for an interval."""


def swap_effect(outcomes: Sequence[np.ndarray], groups: Sequence[np.ndarray]) -> Estimate | None:
    """Estimate the effect of being seen.

    Args:
        outcomes: for each seed, the outcome of its student on every sequence [N].
        groups: for each seed, the overlap class of every sequence: `seen`, `partial` or `held_out` [N].

    Returns:
        The estimate with a normal interval (none below 50 sequences); `n` counts the compared sequences. None if no
        pair of seeds has sequences in both directions.
    """
    values = [np.asarray(one, np.float64) for one in outcomes]
    total, pairs = 0.0, 0
    influence, is_used = np.zeros(values[0].size), np.zeros(values[0].size, bool)
    for pair in itertools.combinations(range(len(values)), 2):
        directions = [
            ((groups[i] == SEEN) & (groups[j] == HELD_OUT), values[i] - values[j]) for i, j in (pair, pair[::-1])
        ]
        if not all(members.any() for members, _ in directions):
            continue
        pairs += 1
        for members, difference in directions:
            mean = float(difference[members].mean())
            total += mean / 2
            influence += np.where(members, (difference - mean) / members.sum(), 0.0) / 2
            is_used |= members
    if not pairs:
        return None
    n, value, error = int(is_used.sum()), total / pairs, math.inf
    if n >= DESCRIPTIVE:
        error = math.sqrt(float(np.sum(influence**2))) / pairs * math.sqrt(n / (n - 1))
    return Effect(value, value, error, math.inf, n).estimate()


def naive_difference(outcomes: Sequence[np.ndarray], groups: Sequence[np.ndarray]) -> float | None:
    """Return seen − held-out within students, which is confounded by selection."""
    found = [
        float(np.mean(values[labels == SEEN]) - np.mean(values[labels == HELD_OUT]))
        for values, labels in zip(outcomes, groups, strict=True)
        if (labels == SEEN).any() and (labels == HELD_OUT).any()
    ]
    return float(np.mean(found)) if found else None
