"""Suffix array over many short texts, with batched search.

The array is that of Manber & Myers (1993). Each text ends with a separator that sorts first and equals no token, so
that no match crosses a boundary. Prefix doubling on tied suffixes builds the array (Larsson & Sadakane 2007). Binary
searches keep the matched lengths at both ends of their intervals.
"""

from dataclasses import dataclass

import numpy as np

DOC_END = -1
"""Ends a text of the array."""
QUERY_END = -2
"""Ends a text that is searched; differs from every entry of the array."""


@dataclass(frozen=True, eq=False)
class SuffixArray:
    """Suffix array of concatenated texts; 12 bytes a token."""

    text: np.ndarray
    """int32: the tokens of the texts, each text followed by DOC_END."""
    suffixes: np.ndarray
    """int32 [tokens]: positions in `text`, sorted by the suffix up to the end of its text."""

    @classmethod
    def build(cls, text: np.ndarray) -> "SuffixArray":
        """Sort the suffixes of tokens with a separator after each text."""
        if len(text) >= 2**31:
            raise ValueError(f"{len(text):,} tokens are too many for one suffix array")
        return cls(text, _sort_suffixes(text).astype(np.int32))

    def locate(self, query: np.ndarray, begin: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find the slots of the suffixes of another text.

        Args:
            query: int32, tokens with QUERY_END after each document.
            begin: integer [C], positions in it.

        Returns:
            [C] each: `low`, the last slot that sorts before the suffix (−1: none), and the lengths of the match with
            slots `low` and `low + 1`. No other slot has a longer match.
        """
        # Invariant: slot low sorts before the suffix, slot high does not; they match *_match tokens.
        low, high = np.full(len(begin), -1), np.full(len(begin), len(self.suffixes))
        low_match, high_match = np.zeros(len(begin), np.int64), np.zeros(len(begin), np.int64)
        open_ = np.flatnonzero(high - low > 1)
        while open_.size:
            middle = (low[open_] + high[open_]) // 2
            pos, start = self.suffixes[middle].astype(np.int64), begin[open_]
            match = extend_match(np.minimum(low_match[open_], high_match[open_]), self.text, pos, query, start)
            before = self.text[pos + match] < query[start + match]
            left, right = open_[before], open_[~before]
            low[left], low_match[left] = middle[before], match[before]
            high[right], high_match[right] = middle[~before], match[~before]
            open_ = open_[high[open_] - low[open_] > 1]
        return low, low_match, high_match

    def lcp_array(self) -> np.ndarray:
        """Return int64 [tokens]: the LCP of each slot with the previous one."""
        shared = np.zeros(len(self.suffixes), np.int64)
        positions = self.suffixes.astype(np.int64)
        shared[1:] = extend_match(shared[1:], self.text, positions[:-1], self.text, positions[1:])
        return shared


def extend_match(
    match: np.ndarray, text: np.ndarray, pos: np.ndarray, other: np.ndarray, start: np.ndarray
) -> np.ndarray:
    """Extend known matches of text[pos:] and other[start:] in place."""
    growing = np.arange(len(match))
    while growing.size:
        token = text[pos[growing] + match[growing]]
        growing = growing[(token == other[start[growing] + match[growing]]) & (token >= 0)]
        match[growing] += 1
    return match


def _sort_suffixes(text: np.ndarray) -> np.ndarray:
    """Sort positions in `text` by the tokens up to the next separator."""
    positions = np.flatnonzero(text != DOC_END)
    order = positions[np.argsort(text[positions], kind="stable")]
    separators = np.flatnonzero(text == DOC_END)
    # rank[p]: first slot of the suffixes equal to that of p on the compared tokens; separators come first.
    rank = np.full(len(text), -1, np.int64)
    slots, key = np.arange(len(order)), text[order].astype(np.int64)
    compared = 1
    while slots.size:
        members = order[slots]
        is_head = np.append(True, key[1:] != key[:-1])
        rank[members] = slots[np.maximum.accumulate(np.where(is_head, np.arange(len(slots)), 0))]
        tied = ~(is_head & np.append(is_head[1:], True))
        slots, members = slots[tied], members[tied]
        # Suffixes that agree up to a separator are equal; tied suffixes have it at the same distance.
        unfinished = separators[np.searchsorted(separators, members)] - members >= compared
        slots, members = slots[unfinished], members[unfinished]
        key = rank[members] * (len(order) + 1) + rank[members + compared] + 1
        arranged = np.argsort(key, kind="stable")
        order[slots], key = members[arranged], key[arranged]
        compared *= 2
    return order
