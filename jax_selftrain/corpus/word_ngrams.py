"""Word n-grams that a corpus shares with documents, for decontamination.

A word is what white space separates in lower-cased text without punctuation: every character that is not a letter, a
mark, a digit or white space is removed (the normalization of arXiv:2605.31126; GPT-3 and PaLM used the same kind).

The documents are indexed; texts are streamed in Arrow batches. A word that no document has interrupts n-grams, which
leaves few candidates. 64-bit hashes select candidates, and their words are compared: the result is exact.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_REMOVED = r"[^\p{L}\p{M}\p{N}\p{Z}\s]+"
_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)
"""Odd 64-bit constants, tried in turn until no two n-grams of the documents have the same hash."""


def split_words(texts: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Split texts into normalized words.

    Returns:
        The words of all texts, and their number by text (int64 [N]).
    """
    plain = pc.replace_substring_regex(pc.utf8_lower(texts), _REMOVED, "")
    lists = pc.utf8_split_whitespace(plain)
    words = lists.flatten()
    is_word = pc.not_equal(words, "")  # leading and trailing white space leaves empty strings
    text_of_word = pc.list_parent_indices(lists).filter(is_word).to_numpy()
    return words.filter(is_word), np.bincount(text_of_word, minlength=len(texts))


@dataclass(frozen=True)
class NgramIndex:
    """Distinct word n-grams of named groups of documents."""

    n: int
    groups: tuple[str, ...]
    num_documents: tuple[int, ...]
    """By group."""
    vocabulary: pa.Array
    """Distinct words of the documents."""
    words: np.ndarray
    """int32, indices into `vocabulary`: all documents, concatenated."""
    hashes: np.ndarray
    """uint64 [G], ascending: one entry for each distinct n-gram."""
    positions: np.ndarray
    """int64 [G], index into `words` of one occurrence."""
    members: np.ndarray
    """int64 [P, 2], ascending: pairs (n-gram, group that has it)."""
    multiplier: int

    @classmethod
    def build(cls, documents: Mapping[str, Iterable[str]], n: int) -> "NgramIndex":
        """Index documents by the name of their group."""
        texts = {group: list(found) for group, found in documents.items()}
        counts = np.array([len(found) for found in texts.values()], np.int64)
        words, lengths = split_words(pa.array([text for found in texts.values() for text in found], pa.string()))
        encoded = words.dictionary_encode()
        ids = encoded.indices.to_numpy().astype(np.int32)
        starts, document = _windows(ids, lengths, n)
        group = np.repeat(np.arange(len(texts)), counts)[document]
        for multiplier in _MULTIPLIERS:
            hashes, first, ngram = np.unique(_hash(ids, starts, n, multiplier), return_index=True, return_inverse=True)
            if _equal_words(ids, starts[first][ngram], ids, starts, n).all():
                members = np.unique(np.stack([ngram, group], axis=1), axis=0)
                dictionary = encoded.dictionary
                return cls(
                    n, tuple(texts), tuple(counts.tolist()), dictionary, ids, hashes, starts[first], members, multiplier
                )
        raise AssertionError("64-bit hashes of different n-grams are equal under three multipliers")

    def find(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """Find the n-grams of texts that the documents have.

        Returns:
            Distinct pairs, int64 [P] each: the index of a text, and of an n-gram.
        """
        words, lengths = split_words(texts)
        ids = pc.fill_null(pc.index_in(words, self.vocabulary), -1).to_numpy()
        starts, text = _windows(ids, lengths, self.n)
        hashes = _hash(ids, starts, self.n, self.multiplier)
        ngram = np.searchsorted(self.hashes, hashes)
        is_candidate = ngram < len(self.hashes)
        is_candidate[is_candidate] = self.hashes[ngram[is_candidate]] == hashes[is_candidate]
        starts, text, ngram = starts[is_candidate], text[is_candidate], ngram[is_candidate]
        is_equal = _equal_words(self.words, self.positions[ngram], ids, starts, self.n)
        pairs = np.unique(np.stack([text[is_equal], ngram[is_equal]], axis=1), axis=0)
        return pairs[:, 0], pairs[:, 1]

    def list_groups(self, ngrams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return pairs (index into `ngrams`, group), int64 [P] each."""
        first, last = (np.searchsorted(self.members[:, 0], ngrams, side) for side in ("left", "right"))
        counts = last - first
        index = np.repeat(np.arange(len(ngrams)), counts)
        offset = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
        return index, self.members[first[index] + offset, 1]

    def format_ngram(self, ngram: int) -> str:
        """Return the normalized words of an n-gram."""
        start = self.positions[ngram]
        return " ".join(self.vocabulary.take(pa.array(self.words[start : start + self.n])).to_pylist())


def _windows(ids: np.ndarray, lengths: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return start and text of each run of n known words."""
    if len(ids) < n:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    text = np.repeat(np.arange(len(lengths)), lengths)
    num_unknown = np.concatenate([[0], np.cumsum(ids < 0)])
    is_window = (text[: len(ids) - n + 1] == text[n - 1 :]) & (num_unknown[n:] == num_unknown[:-n])
    starts = np.flatnonzero(is_window)
    return starts, text[starts]


def _hash(ids: np.ndarray, starts: np.ndarray, n: int, multiplier: int) -> np.ndarray:
    """Hash n words from each start, uint64."""
    hashes = np.zeros(len(starts), np.uint64)
    for offset in range(n):
        hashes = (hashes ^ (ids[starts + offset].astype(np.uint64) + np.uint64(1))) * np.uint64(multiplier)
        hashes ^= hashes >> np.uint64(29)
    return hashes


def _equal_words(a: np.ndarray, starts_a: np.ndarray, b: np.ndarray, starts_b: np.ndarray, n: int) -> np.ndarray:
    equal = np.ones(len(starts_a), bool)
    for offset in range(n):
        equal &= a[starts_a + offset] == b[starts_b + offset]
    return equal
