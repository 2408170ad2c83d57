"""Verbatim overlap, exactly: how many consecutive tokens of a query occur, in that order, in some document of a text.

The queries are indexed and the text, which may be far larger than memory, streams by. Of each of its places a hash of
the next `shortest` tokens is looked up among those of the queries; nearly all places end there. What is left is looked
up in a suffix array of the queries, token by token: a hash only ever saves work, so that what is counted as an overlap
is one and none is missed. A place of the text falls between two neighbors of the array, and what it shares with them
is handed on from neighbor to neighbor by the length that these share (min along the way, max over ways): so each
place of each query learns its longest match, however often text and queries repeat themselves.

Time is that of hashing, a few passes over the text for every `QUERY_BLOCK` tokens of queries; memory that of one such
block and one piece of the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from jax_selftrain.corpus.suffix_array import DOC_END, QUERY_END, SuffixArray
from jax_selftrain.corpus.token_source import TokenSource

QUERY_BLOCK = 1 << 21
"""Query tokens indexed at once; each further block is another pass over the text."""
CHUNK_TOKENS = 1 << 18
"""Tokens of the text looked at together: their hashes stay in the processor's cache."""
_HASH_MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93))


@dataclass(frozen=True, eq=False)
class Overlaps:
    """What Q queries share with a text; int64 [Q] each."""

    length: np.ndarray
    """Tokens of the longest run that occurs in one document; 0 if that is shorter than was asked for."""
    query_start: np.ndarray
    """Where in the query it begins; −1 if there is none."""
    text_doc: np.ndarray
    """A document in which it occurs, by its number in the text; −1 if there is none."""
    text_start: np.ndarray
    """Where in that document; −1 if there is none."""
    covered: np.ndarray
    """Tokens of the query that lie in any run of at least the length that was asked for."""


def longest_overlaps(queries: TokenSource, text: TokenSource, *, min_length: int = 1) -> Overlaps:
    """The longest run of consecutive tokens of each query that occurs in one document of a text.

    Args:
        queries: token ids of 0 and more; the text is read once for every `QUERY_BLOCK` tokens of them.
        text: the same of any size.
        shortest: runs of fewer tokens do not count; the longer, the faster.

    Raises:
        ValueError: `shortest` is below 1, or a token id is negative or beyond 32 bits.
    """
    if min_length < 1:
        raise ValueError(f"a run of {min_length} tokens is no run")
    found = []
    for block in _pieces(queries, QUERY_BLOCK):
        index = _Index(block, min_length)
        for piece in _pieces(text, CHUNK_TOKENS, split_with=int(block.lengths.max())):
            index.scan(piece)
        found.append(index.overlaps())
    if not found:
        return Overlaps(*[np.zeros(0, np.int64)] * 5)
    return Overlaps(*(np.concatenate([getattr(part, f.name) for part in found]) for f in fields(Overlaps)))


class _Chunk(NamedTuple):
    """Whole documents, or a part of one."""

    tokens: np.ndarray
    """int32, end to end."""
    lengths: np.ndarray
    document: int
    """Number of the first."""
    place: int
    """Where in it the piece begins."""

    def with_terminator(self, mark: int) -> np.ndarray:
        """The tokens with a mark after each document."""
        return np.insert(self.tokens, np.cumsum(self.lengths), mark)


def _pieces(documents: TokenSource, size: int, *, split_with: int | None = None) -> Iterator[_Chunk]:
    """Documents in pieces of about `size` tokens; longer ones by themselves.

    With `split_with` long documents are cut, each part being followed by so many tokens of the next: a run of no more
    than these lies whole in the part that it begins in.
    """
    number = 0
    for flat, lengths in documents.token_batches():
        ends = np.cumsum(lengths, dtype=np.int64)
        first = 0
        while first < len(ends):
            begin = int(ends[first] - lengths[first])
            last = max(first + 1, int(np.searchsorted(ends, begin + size, side="right")))
            whole = int(ends[last - 1]) - begin
            step = whole if split_with is None or whole <= size else size
            for at in range(0, whole, step) if whole else [0]:
                part = slice(begin + at, begin + min(at + step + (split_with or 0), whole))
                inside = lengths[first:last] if step == whole else np.array([part.stop - part.start])
                yield _Chunk(_checked(flat[part]), inside, number + first, at)
            first = last
        number += len(lengths)


def _checked(tokens: np.ndarray) -> np.ndarray:
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < 2**31:
        raise ValueError("token ids must not be negative, nor beyond 32 bits")
    return np.ascontiguousarray(tokens, np.int32)


class _Index:
    """A block of queries, and the longest match that every place of them has found so far."""

    def __init__(self, queries: _Chunk, shortest: int) -> None:
        self._lengths, self._shortest = queries.lengths, shortest
        self._suffixes = SuffixArray.build(queries.with_terminator(DOC_END))
        self._known = np.unique(_hashes(self._suffixes.text, shortest))
        bits = min(26, max(16, 5 + len(self._known).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._maybe = np.zeros(1 << bits, bool)  # one look into a few MB settles nearly every place
        self._maybe[self._known >> self._shift] = True
        slots = len(self._suffixes.suffixes)
        self._match, self._document, self._place = (np.zeros(slots, np.int64) for _ in range(3))

    def scan(self, piece: _Chunk) -> None:
        """Let every place of a piece of the text leave its mark at its two neighbors in the array."""
        sought = piece.with_terminator(QUERY_END)
        begin = self._candidates(sought)
        if not len(begin):
            return
        low, low_match, high_match = self._suffixes.locate(sought, begin)
        slot, match = np.concatenate([low, low + 1]), np.concatenate([low_match, high_match])
        begin = np.concatenate([begin, begin])
        better = np.flatnonzero(match >= self._shortest)
        better = better[match[better] > self._match[slot[better]]]
        # Of several marks on one slot the last one stays: the longest, and of equals the first in the text.
        better = better[np.lexsort((-begin[better], match[better]))]
        slot, begin = slot[better], begin[better]
        ends = np.cumsum(piece.lengths + 1)
        document = np.searchsorted(ends, begin, side="right")
        self._match[slot] = match[better]
        self._document[slot] = piece.document + document
        self._place[slot] = begin - (ends[document] - piece.lengths[document] - 1) + piece.place

    def overlaps(self) -> Overlaps:
        """What has been found, by query."""
        match, source = self._shared_among_neighbors()
        text, order = self._suffixes.text, self._suffixes.suffixes
        run, slot_of = np.zeros(len(text), np.int64), np.zeros(len(text), np.int64)
        run[order], slot_of[order] = match, source
        starts = np.cumsum(self._lengths + 1) - self._lengths - 1
        longest = np.maximum.reduceat(run, starts)
        query = np.repeat(np.arange(len(starts)), self._lengths + 1)
        best = np.flatnonzero(run == longest[query])
        best = best[np.unique(query[best], return_index=True)[1]]
        place = np.arange(len(text))
        covered = np.maximum.accumulate(place + run) > place
        none = longest == 0
        return Overlaps(
            length=longest,
            query_start=np.where(none, -1, best - starts),
            text_doc=np.where(none, -1, self._document[slot_of[best]]) if len(order) else np.full(len(none), -1),
            text_start=np.where(none, -1, self._place[slot_of[best]]) if len(order) else np.full(len(none), -1),
            covered=np.add.reduceat(covered.astype(np.int64), starts),
        )

    def _candidates(self, sought: np.ndarray) -> np.ndarray:
        """Places whose next tokens have a hash that occurs among the queries."""
        hashes = _hashes(sought, self._shortest)
        places = np.flatnonzero(self._maybe[hashes >> self._shift])
        wanted = hashes[places]
        nearest = np.searchsorted(self._known, wanted)
        return places[self._known[np.minimum(nearest, len(self._known) - 1)] == wanted]

    def _shared_among_neighbors(self) -> tuple[np.ndarray, np.ndarray]:
        """The longest match of each slot, its own or a neighbor's as far as both agree, and the slot it came from."""
        shared = self._suffixes.lcp_array()
        shared[shared < self._shortest] = 0
        match, source = self._match.copy(), np.arange(len(shared))
        _propagate_max(match, source, shared)
        _propagate_max(match[::-1], source[::-1], np.append(shared[1:], 0)[::-1])
        return match, source


def _propagate_max(match: np.ndarray, source: np.ndarray, shared: np.ndarray) -> None:
    """match[k] = max over j ≤ k of min(match[j], shared[j+1], …, shared[k]), and whose match it was; in place.

    A scan by doubling: after step i each slot has heard from the 2^i before it.
    """
    reach = shared.copy()
    step = 1
    while step < len(match) and reach.any():
        candidate = np.minimum(match[:-step], reach[step:])
        better = candidate > match[step:]
        passed = source[:-step][better]
        match[step:][better] = candidate[better]
        source[step:][better] = passed
        reach[step:] = np.minimum(reach[step:], reach[:-step])
        reach[:step] = 0
        step *= 2


def _hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """A hash of the n tokens from each place on; uint64 [max(0, len − n + 1)].

    Windows of twice the width are made of two beside each other, the last ones of two that overlap.
    """
    if len(tokens) < n:
        return np.zeros(0, np.uint64)
    hashes = tokens.astype(np.uint64)
    hashes *= _HASH_MULTIPLIERS[0]
    hashes ^= hashes >> np.uint64(32)
    width = 1
    while width < n:
        step = min(width, n - width)
        wider = hashes[:-step] * _HASH_MULTIPLIERS[1]
        wider += hashes[step:]
        wider ^= wider >> np.uint64(29)
        hashes, width = wider, width + step
    hashes *= _HASH_MULTIPLIERS[0]  # the top bits, by which hashes are looked up, then depend on all others
    return hashes
