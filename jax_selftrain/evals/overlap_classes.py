"""Which sequences a corpus has shown: classes by the longest run of their suffix that stands in one document.

`held_out`: the run is shorter than a threshold; `seen`: it is the whole suffix; `partial`: between. What a model emits
is what it memorized best, so this is a selected split: compare classes with care.

A corpus in another tokenizer's tokens is matched on its text, encoded again by the model's own tokenizer as running
text (canonically). A run that begins or ends inside a token of the one or the other loses that token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_selftrain import hub
from jax_selftrain.corpus import Corpus, LazilyTokenized, Overlaps, RaggedTokens, longest_overlaps

CLASSES = ("held_out", "partial", "seen")
THRESHOLDS = (8, 16, 32)
"""Shown beside the one chosen."""


@dataclass(frozen=True)
class CorpusOverlap:
    """What a corpus has shown of some suffixes."""

    overlaps: Overlaps
    shortest: int
    """Runs of fewer tokens count as none."""
    matched_on: str
    """`tokens`, or `text` where the corpus has another tokenizer."""


def corpus_overlap(corpus: Corpus, model: str, suffixes: np.ndarray, overlap: int) -> CorpusOverlap:
    """Look for suffixes [N, S] of a model's tokens in a corpus, exactly down to the least threshold in use."""
    shortest = min(*THRESHOLDS, overlap, suffixes.shape[1])
    own = corpus.manifest["tokenizer_fingerprint"] == hub.open_model(model).tokenizer_fingerprint
    text = corpus if own else LazilyTokenized(corpus.iter_texts, hub.open_model(model).tokenizer)
    found = longest_overlaps(RaggedTokens.from_list(suffixes), text, min_length=shortest)
    return CorpusOverlap(found, shortest, "tokens" if own else "text")


def classify(overlaps: np.ndarray, suffix: int, overlap: int) -> np.ndarray:
    """Class [N] of each sequence, from its longest overlap with the corpus in tokens: `held_out`, `partial`, `seen`."""
    return np.where(overlaps >= suffix, "seen", np.where(overlaps >= overlap, "partial", "held_out"))


def duplicate_buckets(duplicates: np.ndarray) -> dict[str, np.ndarray]:
    """Members (bool [N]) of the non-empty buckets 0, 1, 2, 3–4, 5–8, 9–16 … of how often sequences were shown."""
    buckets: dict[str, np.ndarray] = {}
    low, high = 0, 0
    while low <= int(duplicates.max(initial=-1)):
        members = (duplicates >= low) & (duplicates <= high)
        if members.any():
            buckets[str(low) if low == high else f"{low}-{high}"] = members
        low, high = high + 1, max(1, 2 * high)
    return buckets


def to_columns(seen: CorpusOverlap, suffix: int, overlap: int) -> dict[str, Any]:
    """What is told of each sequence: its longest overlap, where it stands, and its class."""
    return {
        "overlap": seen.overlaps.length,
        "document": seen.overlaps.text_doc,
        "class": classify(seen.overlaps.length, suffix, overlap),
    }
