"""What being seen does to a sequence, told apart from what makes it be seen.

A model emits what it memorized best. Sequences that stand in its corpus are therefore remembered better than others
before anything is trained, and seen − held-out within one student is the effect of that selection. Seeds draw corpora
of their own: where X and Y are two of them, the sequences of X∖Y stand in one and not in the other by the luck of the
draw, and

    ½ [ mean over X∖Y of (student of X − student of Y)  +  mean over Y∖X of (student of Y − student of X) ]

compares the same sequences with themselves. Taking both directions with equal weight cancels whatever makes one of the
two students better than the other; the mean over all pairs of seeds is the estimate. The error is over sequences: it
speaks of these students.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import scipy

from jax_selftrain.stats.estimators import Estimate
from jax_selftrain.stats.standard_errors import CONFIDENCE_LEVEL

SEEN, HELD_OUT = "seen", "held_out"
DESCRIPTIVE = 50
"""Of fewer sequences there is a number but no interval."""


def swap_effect(outcomes: Sequence[np.ndarray], groups: Sequence[np.ndarray]) -> Estimate | None:
    """The effect of being seen, and its interval.

    Args:
        outcomes: for each seed, what its student does on every sequence, [N].
        classes: for each seed, whether its corpus holds the sequence: `seen`, `partial` or `held_out`, [N].

    Returns:
        The estimate with a normal interval (none below 50 sequences); `n` counts the sequences that some pair compares.
        None where no pair of seeds has sequences both ways.
    """
    values = [np.asarray(one, np.float64) for one in outcomes]
    total, pairs = 0.0, 0
    influence, used = np.zeros(values[0].size), np.zeros(values[0].size, bool)
    for a, b in itertools.combinations(range(len(values)), 2):
        only = [(groups[i] == SEEN) & (groups[j] == HELD_OUT) for i, j in ((a, b), (b, a))]
        if not all(members.any() for members in only):
            continue
        pairs += 1
        for members, sign in zip(only, (1.0, -1.0), strict=True):
            difference = sign * (values[a] - values[b])
            mean = float(difference[members].mean())
            total += mean / 2
            influence += np.where(members, (difference - mean) / members.sum(), 0.0) / 2
            used |= members
    if not pairs:
        return None
    n = int(used.sum())
    value = total / pairs
    if n < DESCRIPTIVE:
        return Estimate(value, None, None, n)
    error = math.sqrt(float(np.sum(influence**2))) / pairs * math.sqrt(n / max(n - 1, 1))
    half = float(scipy.stats.norm.ppf((1 + CONFIDENCE_LEVEL) / 2)) * error
    return Estimate(value, value - half, value + half, n)


def naive_difference(outcomes: Sequence[np.ndarray], classes: Sequence[np.ndarray]) -> float | None:
    """Seen − held-out within each student, averaged over seeds: the selected split, shown beside as what it is."""
    found = [
        float(np.mean(values[labels == SEEN]) - np.mean(values[labels == HELD_OUT]))
        for values, labels in zip(outcomes, classes, strict=True)
        if (labels == SEEN).any() and (labels == HELD_OUT).any()
    ]
    return float(np.mean(found)) if found else None
