"""Corpora without what they would show of chosen sequences, and their companions.

**Scrubbing** drops every document that shares a run of tokens with any of some sequences. What a student of the rest
still reproduces of these it has not read there. But the rest is smaller, and other text: its **companion** drops
equally many of the *other* documents, each like one that was dropped in how it ended and in length, so that students of
the two differ in nothing but having read of the sequences.
"""

from __future__ import annotations

from pathlib import Path

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
    corpus: atomic.PathLike, sequences: np.ndarray, out: atomic.PathLike, *, length: int = 16
) -> Corpus:
    """A corpus without the documents that share `length` consecutive tokens with a sequence.

    Args:
        corpus: a corpus folder.
        sequences: int [N, S], in the corpus's own tokens; of fewer than `length` tokens all must be shared.
        out: the corpus folder to write; its documents are numbered anew.
        length: tokens in a row from which a document is dropped.

    Raises:
        InputError: a folder cannot be read or written, `out` holds another corpus, or nothing is left.
    """
    source = open_corpus(corpus)
    sharing = _overlaps_any(source, sequences, length)
    if sharing.all():
        raise InputError(f"{corpus}: every document shares {length} tokens with a held-out sequence; nothing is left")
    return _write_without(source, out, "scrubbed", sharing, {"length": length}, sequences)


def size_matched_control(
    corpus: atomic.PathLike, sequences: np.ndarray, out: atomic.PathLike, *, seed: int, length: int = 16
) -> Corpus:
    """A corpus without as many documents as `scrub` drops, none of them one of those: its companion.

    For each document that would be scrubbed, in an order drawn by the seed, one that ended likewise is dropped whose
    length is nearest; of equals the one that the seed puts first.

    Args:
        corpus, sequences, out, length: as of `scrub`.
        seed: of the choice; it decides the same for good (raw Philox words).

    Raises:
        InputError: a folder cannot be read or written, `out` holds another corpus, or there are not as many others.
    """
    source = open_corpus(corpus)
    sharing = _overlaps_any(source, sequences, length)
    dropped = _match_on_length_and_stop(source, sharing, seed)
    return _write_without(source, out, "companion of scrubbed", dropped, {"length": length, "seed": seed}, sequences)


def _overlaps_any(source: Corpus, sequences: np.ndarray, length: int) -> np.ndarray:
    """Which documents share a run with a sequence; bool [N]."""
    shortest = min(length, sequences.shape[1])
    return longest_overlaps(source, RaggedTokens.from_list(sequences), min_length=shortest).length >= shortest


def _match_on_length_and_stop(source: Corpus, sharing: np.ndarray, seed: int) -> np.ndarray:
    """As many of the others, alike in ending and length; bool [N]."""
    _, offsets, reasons = source.token_arrays()
    lengths = np.diff(offsets)
    order = random_permutation(make_rng("size-matched control", seed), len(source))
    dropped = np.zeros(len(source), bool)
    for reason in np.unique(reasons[sharing]):
        alike = order[reasons[order] == reason]
        free, wanted = alike[~sharing[alike]], alike[sharing[alike]]
        if len(free) < len(wanted):
            raise InputError(
                f"{source.folder}: too few documents share nothing with the held-out sequences to drop as many; "
                "sample more, or hold out fewer sequences"
            )
        for place in wanted:
            distance = np.where(dropped[free], np.iinfo(np.int64).max, np.abs(lengths[free] - lengths[place]))
            dropped[free[np.argmin(distance)]] = True
    return dropped


def _write_without(
    source: Corpus,
    out: atomic.PathLike,
    kind: str,
    dropped: np.ndarray,
    how: dict[str, int],
    sequences: np.ndarray,
) -> Corpus:
    mark = hash_json(np.asarray(sequences, np.int64).tolist())
    policy = {f"{kind} {name}": value for name, value in how.items()}
    described = {key: source.manifest[key] for key in ("tokenizer_fingerprint", "start_id", "stop_ids")}
    return map_corpus(
        source,
        Path(out),
        kind,
        described | {"dropped": int(dropped.sum()), "held_out_sequences": mark},
        policy,
        lambda samples: (samples, {}),
        np.flatnonzero(~dropped),
    )
