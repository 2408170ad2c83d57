"""A suffix array over many short texts, and where in it the suffixes of a long one belong.

The array (Manber & Myers 1993) is over all texts, each ended by a separator that sorts before and equals no token, so
that no match crosses an edge. It is built by prefix doubling on the suffixes that are still tied (Larsson & Sadakane
2007) and searched for many places at once, each binary search carrying the lengths it already matched at both ends of
its interval.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DOC_END = -1
"""Ends a text of the array."""
QUERY_END = -2
"""Ends a text that is looked up; differs from every entry of the array, so that comparisons stop there."""


@dataclass(frozen=True, eq=False)
class SuffixArray:
    """12 bytes a token, about 50 while it is being built."""

    text: np.ndarray
    """int32: the texts' tokens, a separator after each of them."""
    suffixes: np.ndarray
    """int32 [tokens]: places in `text` of all tokens, sorted by what follows up to the end of their text."""

    @classmethod
    def build(cls, text: np.ndarray) -> SuffixArray:
        """Sort the suffixes of tokens that hold a separator after each text."""
        if len(text) >= 2**31:
            raise ValueError(f"{len(text):,} tokens are too many for one suffix array")
        return cls(text, _sort_suffixes(text).astype(np.int32))

    def locate(self, query: np.ndarray, begin: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the suffixes of another text belong.

        Args:
            sought: int32, its tokens, a `STOP` after each document.
            begin: integer [C], places in it.

        Returns:
            [C] each: `low`, the last slot of `order` that sorts before the suffix (−1: none), and how many tokens agree
            with the suffix at slot `low` and at slot `low + 1`. Of all suffixes, these two agree longest.
        """
        # Invariant: order[low] sorts before the suffix, order[high] does not; they agree on *_match tokens.
        low, high = np.full(len(begin), -1), np.full(len(begin), len(self.suffixes))
        low_match, high_match = np.zeros(len(begin), np.int64), np.zeros(len(begin), np.int64)
        open_ = np.flatnonzero(high - low > 1)
        while open_.size:
            middle = (low[open_] + high[open_]) // 2
            place, start = self.suffixes[middle].astype(np.int64), begin[open_]
            match = extend_match(np.minimum(low_match[open_], high_match[open_]), self.text, place, query, start)
            before = self.text[place + match] < query[start + match]
            left, right = open_[before], open_[~before]
            low[left], low_match[left] = middle[before], match[before]
            high[right], high_match[right] = middle[~before], match[~before]
            open_ = open_[high[open_] - low[open_] > 1]
        return low, low_match, high_match

    def lcp_array(self) -> np.ndarray:
        """How many tokens the suffix of each slot shares with that of the slot before; int64 [tokens], first 0."""
        shared = np.zeros(len(self.suffixes), np.int64)
        places = self.suffixes.astype(np.int64)
        shared[1:] = extend_match(shared[1:], self.text, places[:-1], self.text, places[1:])
        return shared


def extend_match(
    match: np.ndarray, text: np.ndarray, pos: np.ndarray, other: np.ndarray, start: np.ndarray
) -> np.ndarray:
    """The number of tokens on which text[place:] and other[start:] agree, `match` of them being known to; in place."""
    growing = np.arange(len(match))
    while growing.size:
        token = text[pos[growing] + match[growing]]
        growing = growing[(token == other[start[growing] + match[growing]]) & (token >= 0)]
        match[growing] += 1
    return match


def _sort_suffixes(text: np.ndarray) -> np.ndarray:
    """Places of the tokens in `text`, sorted by the tokens from there to the next separator."""
    places = np.flatnonzero(text != DOC_END)
    order = places[np.argsort(text[places], kind="stable")]
    separators = np.flatnonzero(text == DOC_END)
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
