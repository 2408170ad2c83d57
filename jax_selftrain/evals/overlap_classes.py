"""Overlap classes: how much of a suffix occurs in the training corpus.

The longest verbatim match of a suffix with one document decides: `held_out` (shorter than a threshold), `seen` (the
whole suffix), `partial` (between). A model samples what it memorized best, so the classes are a selected split.

A corpus with another tokenizer is matched on its text, tokenized with the model's tokenizer. A match that begins or
ends inside a token loses that token.
"""

from __future__ import annotations

import numpy as np

from jax_selftrain import hub
from jax_selftrain.corpus import Corpus, LazilyTokenized, Overlaps, RaggedTokens, longest_overlaps

CLASSES = ("held_out", "partial", "seen")
THRESHOLDS = (8, 16, 32)
"""Alternative thresholds that are reported, in tokens."""


def corpus_overlap(corpus: Corpus, model: str, suffixes: np.ndarray, min_overlap: int) -> tuple[Overlaps, str]:
    """Find the longest matches of suffixes [N, suffix] in a corpus.

    Matches shorter than all thresholds count as none.

    Returns:
      The matches, and `tokens`, or `text` if the corpus has another tokenizer.
    """
    min_length = min(*THRESHOLDS, min_overlap, suffixes.shape[1])
    source = hub.open_model(model)
    same_tokens = corpus.manifest["tokenizer_fingerprint"] == source.tokenizer_fingerprint
    text = corpus if same_tokens else LazilyTokenized(corpus.iter_texts, source.tokenizer)
    overlaps = longest_overlaps(RaggedTokens.from_list(suffixes), text, min_length=min_length)
    return overlaps, "tokens" if same_tokens else "text"


def classify(lengths: np.ndarray, suffix: int, min_overlap: int) -> np.ndarray:
    """Return the class [N] of each sequence from its match length."""
    return np.where(lengths >= suffix, "seen", np.where(lengths >= min_overlap, "partial", "held_out"))


def duplicate_buckets(duplicates: np.ndarray) -> dict[str, np.ndarray]:
    """Return the members, bool [N], of buckets 0, 1, 2, 3–4 …."""
    buckets: dict[str, np.ndarray] = {}
    low, high = 0, 0
    while low <= int(duplicates.max(initial=-1)):
        members = (duplicates >= low) & (duplicates <= high)
        if members.any():
            buckets[str(low) if low == high else f"{low}-{high}"] = members
        low, high = high + 1, max(1, 2 * high)
    return buckets
