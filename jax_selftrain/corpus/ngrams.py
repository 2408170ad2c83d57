"""Verbatim overlap, exactly: how many consecutive tokens of a query occur, in that order, in some document.

A suffix array (Manber & Myers 1993) over all documents, each ended by a separator that sorts before and equals no
token, so that no match crosses the edge of a document. It is built by prefix doubling on the suffixes that are still
tied (Larsson & Sadakane 2007), and searched for all queries at once, each query's binary search carrying the lengths it
already matched at both ends of its interval. No hashes: what is counted as an overlap is one, and none is missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SEPARATOR = -1  # ends a document
_QUERY_END = -2  # ends a query; differs from every entry of the text, so that comparisons stop there
_QUERY_BLOCK = 1 << 18  # query tokens searched at once: bounds the memory of a search to some tens of MB


@dataclass(frozen=True, eq=False)
class NgramIndex:
    """Index of a set of documents; 12 bytes a token, about 50 while it is being built."""

    text: np.ndarray
    """int32: the documents' tokens, a separator after each document."""
    order: np.ndarray
    """int64 or int32 [tokens]: places in `text` of all tokens, sorted by what follows up to the end of the document."""

    @classmethod
    def build(cls, tokens: np.ndarray, offsets: np.ndarray) -> NgramIndex:
        """Index the documents tokens[offsets[d]:offsets[d+1]] (as `Corpus.token_arrays` gives them).

        Args:
            tokens: integer [sum of lengths], none negative.
            offsets: integer [N+1], ascending from 0.
        """
        tokens, offsets = np.asarray(tokens), np.asarray(offsets, np.int64)
        if len(tokens) and tokens.min() < 0:
            raise ValueError("token ids must not be negative")
        text = np.insert(tokens.astype(np.int32), offsets[1:], _SEPARATOR)
        order = _sort_suffixes(text)
        return cls(text, order.astype(np.int32) if len(text) < 2**31 else order)

    def longest_overlap(self, queries: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        """Length of the longest run of consecutive tokens of each query that occurs in one document.

        Args:
            queries: integer [Q, S], or Q vectors of any lengths; negative ids never match.

        Returns:
            int64 [Q].
        """
        lengths = np.array([len(query) for query in queries], np.int64)
        longest = np.zeros(len(lengths), np.int64)
        block_of = np.cumsum(lengths) // _QUERY_BLOCK
        for block in np.unique(block_of).tolist():
            members = np.flatnonzero(block_of == block)
            runs = self.matches(np.concatenate([queries[member] for member in members.tolist()]), lengths[members])
            np.maximum.at(longest, np.repeat(members, lengths[members]), runs)
        return longest

    def matches(self, flat: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Matching statistics: for each place of each query, how many tokens from there on occur in one document.

        Args:
            flat: integer [sum of lengths], the queries one after the other.
            lengths: integer [Q].

        Returns:
            int64 [sum of lengths].
        """
        flat = np.asarray(flat)
        ends = np.cumsum(lengths)
        sought = np.insert(np.where(flat < 0, _QUERY_END, flat).astype(np.int32), ends, _QUERY_END)
        begin = np.arange(len(flat)) + np.repeat(np.arange(len(lengths)), lengths)
        # Invariant: order[low] sorts before the query's suffix, order[high] does not; they agree on *_match tokens.
        low, high = np.full(len(flat), -1), np.full(len(flat), len(self.order))
        low_match, high_match = np.zeros(len(flat), np.int64), np.zeros(len(flat), np.int64)
        open_ = np.flatnonzero(high - low > 1)
        while open_.size:
            middle = (low[open_] + high[open_]) // 2
            place = self.order[middle].astype(np.int64)
            match = np.minimum(low_match[open_], high_match[open_])
            growing = np.arange(open_.size)
            while growing.size:
                same = self.text[place[growing] + match[growing]] == sought[begin[open_[growing]] + match[growing]]
                growing = growing[same]
                match[growing] += 1
            before = self.text[place + match] < sought[begin[open_] + match]
            left, right = open_[before], open_[~before]
            low[left], low_match[left] = middle[before], match[before]
            high[right], high_match[right] = middle[~before], match[~before]
            open_ = open_[high[open_] - low[open_] > 1]
        # The suffix that agrees longest is a neighbour of the place where the query would stand.
        return np.maximum(low_match, high_match)


def _sort_suffixes(text: np.ndarray) -> np.ndarray:
    """Places of the tokens in `text`, sorted by the tokens from there to the next separator."""
    places = np.flatnonzero(text != _SEPARATOR)
    order = places[np.argsort(text[places], kind="stable")]
    separators = np.flatnonzero(text == _SEPARATOR)
    # rank[p]: first slot in `order` of the suffixes that agree with p's on the tokens compared; separators come first.
    rank = np.full(len(text), -1, np.int64)
    slots, key = np.arange(len(order)), text[order].astype(np.int64)
    compared = 1
    while slots.size:
        members = order[slots]
        is_head = np.append(True, key[1:] != key[:-1])
        rank[members] = slots[np.maximum.accumulate(np.where(is_head, np.arange(len(slots)), 0))]
        tied = ~(is_head & np.append(is_head[1:], True))
        slots, members = slots[tied], members[tied]
        # Suffixes that agree up to a separator are equal for good; ties with one have all got it, at the same distance.
        unfinished = separators[np.searchsorted(separators, members)] - members >= compared
        slots, members = slots[unfinished], members[unfinished]
        key = rank[members] * (len(order) + 1) + rank[members + compared] + 1
        arranged = np.argsort(key, kind="stable")
        order[slots], key = members[arranged], key[arranged]
        compared *= 2
    return order
