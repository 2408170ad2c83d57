"""Decontaminated corpora, and size-matched controls.

A decontaminated corpus lacks every document that shares a run of tokens with some sequences: its student did not read
them. It is also smaller and holds other text. The size-matched control therefore drops equally many other documents of
the same finish reasons and similar lengths.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jax_selftrain.corpus.overlap import longest_overlaps
from jax_selftrain.corpus.reader import Corpus, open_corpus
from jax_selftrain.corpus.token_source import RaggedTokens
from jax_selftrain.corpus.transforms import map_corpus
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.io.manifest import hash_json
from jax_selftrain.io.rng import make_rng, random_permutation


def remove_overlapping(
    corpus: atomic.PathLike | Corpus, sequences: np.ndarray, out: atomic.PathLike, *, length: int = 16
) -> Corpus:
    """Copy a corpus without the documents that share tokens with a sequence.

    Args:
        corpus: a corpus, or its folder.
        sequences: int [N, S], tokens of the corpus's tokenizer.
        out: the corpus folder to write; its documents get new ids.
        length: number of consecutive shared tokens (S if fewer) that drops a document.

    Raises:
        InputError: a folder cannot be read or written, `out` holds another corpus, or every document is dropped.
    """
    source = open_corpus(corpus)
    overlapping = _overlaps_any(source, sequences, length)
    if overlapping.all():
        raise InputError(
            f"{source.folder}: every document shares {length} tokens with a held-out sequence; none would remain"
        )
    return _write_without(source, out, "decontaminated", overlapping, sequences, length=length)


def size_matched_control(
    corpus: atomic.PathLike | Corpus, sequences: np.ndarray, out: atomic.PathLike, *, seed: int, length: int = 16
) -> Corpus:
    """Drop as many documents as `remove_overlapping`, but without overlap.

    For each overlapping document, in a random order, the document of the same finish reason and the nearest length is
    dropped; of several the first in that order.

    Args:
        corpus, sequences, out, length: see `remove_overlapping`.
        seed: seed of the order.

    Raises:
        InputError: a folder cannot be read or written, `out` holds another corpus, or there are too few others.
    """
    source = open_corpus(corpus)
    overlapping = _overlaps_any(source, sequences, length)
    _, offsets, reasons = source.token_arrays()
    lengths = np.diff(offsets)
    order = random_permutation(make_rng("size-matched control", seed), len(source))
    dropped = np.zeros(len(source), bool)
    for reason in np.unique(reasons[overlapping]):
        same_reason = order[reasons[order] == reason]
        free, wanted = same_reason[~overlapping[same_reason]], same_reason[overlapping[same_reason]]
        if len(free) < len(wanted):
            raise InputError(
                f"{source.folder}: too few documents without overlap to match those with overlap; "
                "sample more, or hold out fewer sequences"
            )
        for document in wanted:
            distance = np.where(dropped[free], np.iinfo(np.int64).max, np.abs(lengths[free] - lengths[document]))
            dropped[free[np.argmin(distance)]] = True
    return _write_without(source, out, "size-matched control", dropped, sequences, length=length, seed=seed)


def _overlaps_any(source: Corpus, sequences: np.ndarray, length: int) -> np.ndarray:
    """Return bool [N]: True for documents that overlap with a sequence."""
    shortest = min(length, sequences.shape[1])
    return longest_overlaps(source, RaggedTokens.from_list(sequences), min_length=shortest).length >= shortest


def _write_without(
    source: Corpus, out: atomic.PathLike, kind: str, dropped: np.ndarray, sequences: np.ndarray, **options: int
) -> Corpus:
    facts: dict[str, Any] = {
        "policy": {f"{kind} {name}": value for name, value in options.items()},
        "dropped": int(dropped.sum()),
        "held_out_sequences": hash_json(np.asarray(sequences, np.int64).tolist()),
    }
    return map_corpus(source, out, kind, facts, lambda samples: (samples, {}), keep=~dropped)
