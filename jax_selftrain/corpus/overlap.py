"""Exact verbatim overlap: the longest common run of query and text.

The queries are indexed; the text, which may exceed memory, is streamed. A hash of the next `min_length` tokens at each
text position is looked up among those of the queries, which rejects nearly all positions. The rest are searched in a
suffix array of the queries token by token, so the result is exact. A text position falls between two neighbors of the
array; its match with them spreads to further neighbors through the LCP array, so that every query position gets its
longest match. The text is read once for every `QUERY_BLOCK` query tokens; memory holds one such block and one chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from jax_selftrain.corpus.suffix_array import DOC_END, QUERY_END, SuffixArray
from jax_selftrain.corpus.token_source import TokenSource

QUERY_BLOCK = 1 << 21
"""Query tokens indexed at once; each block is one pass over the text."""
CHUNK_TOKENS = 1 << 18
"""Text tokens scanned at once; their hashes fit the processor's cache."""
_HASH_MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93))


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Overlaps of Q queries with a text; int64 [Q] each."""

    length: np.ndarray
    """Tokens of the longest run that occurs in one document; 0 if below `min_length`."""
    query_start: np.ndarray
    """Start of the run in the query; −1 if there is none."""
    text_doc: np.ndarray
    """Index of a document with the run; −1 if there is none."""
    text_start: np.ndarray
    """Start of the run in that document; −1 if there is none."""
    covered: np.ndarray
    """Tokens of the query in any run of at least `min_length`."""


def longest_overlaps(queries: TokenSource, text: TokenSource, *, min_length: int = 1) -> Overlaps:
    """Find the longest run of each query that occurs in a document.

    Args:
        queries: non-negative token ids; the text is read once for every `QUERY_BLOCK` of them.
        text: non-negative token ids, of any number.
        min_length: shorter runs do not count; a larger value is faster.

    Raises:
        ValueError: `min_length` is below 1, or a token id is negative or exceeds 32 bits.
    """
    if min_length < 1:
        raise ValueError(f"min_length must be at least 1, not {min_length}")
    found = []
    for block in _chunks(queries, QUERY_BLOCK):
        index = _Index(block, min_length)
        for chunk in _chunks(text, CHUNK_TOKENS, split_with=int(block.lengths.max())):
            index.scan(chunk)
        found.append(index.overlaps())
    if not found:
        return Overlaps(*[np.zeros(0, np.int64)] * 5)
    return Overlaps(*(np.concatenate([getattr(part, f.name) for part in found]) for f in fields(Overlaps)))


class _Chunk(NamedTuple):
    """Consecutive documents, or a part of one."""

    tokens: np.ndarray
    """int32, documents concatenated."""
    lengths: np.ndarray
    document: int
    """Index of the first."""
    start: int
    """Start of the chunk in the first document."""

    def with_terminator(self, mark: int) -> np.ndarray:
        """Return the tokens with a mark after each document."""
        return np.insert(self.tokens, np.cumsum(self.lengths), mark)


def _chunks(documents: TokenSource, size: int, *, split_with: int | None = None) -> Iterator[_Chunk]:
    """Yield documents in chunks of about `size` tokens.

    A longer document is a chunk of its own. With `split_with` it is split, and each part also holds that many tokens of
    the next part, so that a run of at most `split_with` tokens is whole in the part in which it starts.
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
                yield _Chunk(_check_tokens(flat[part]), inside, number + first, at)
            first = last
        number += len(lengths)


def _check_tokens(tokens: np.ndarray) -> np.ndarray:
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < 2**31:
        raise ValueError("token ids must be non-negative and fit 32 bits")
    return np.ascontiguousarray(tokens, np.int32)


class _Index:
    """Index of a block of queries, with the longest match per position."""

    def __init__(self, queries: _Chunk, min_length: int) -> None:
        self._lengths, self._min_length = queries.lengths, min_length
        self._suffixes = SuffixArray.build(queries.with_terminator(DOC_END))
        self._known = np.unique(_hashes(self._suffixes.text, min_length))
        bits = min(26, max(16, 5 + len(self._known).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._maybe = np.zeros(1 << bits, bool)  # a table of a few MB rejects nearly every position
        self._maybe[self._known >> self._shift] = True
        slots = max(1, len(self._suffixes.suffixes))  # one for queries without tokens
        self._match, self._document, self._start = (np.zeros(slots, np.int64) for _ in range(3))

    def scan(self, chunk: _Chunk) -> None:
        """Match the positions of a chunk with their neighbors in the array."""
        sought = chunk.with_terminator(QUERY_END)
        hashes = _hashes(sought, self._min_length)
        begin = np.flatnonzero(self._maybe[hashes >> self._shift])
        nearest = np.minimum(np.searchsorted(self._known, hashes[begin]), len(self._known) - 1)
        begin = begin[self._known[nearest] == hashes[begin]]  # their hash occurs among the queries
        if not len(begin):
            return
        low, low_match, high_match = self._suffixes.locate(sought, begin)
        slot, match = np.concatenate([low, low + 1]), np.concatenate([low_match, high_match])
        begin = np.concatenate([begin, begin])
        better = np.flatnonzero(match >= self._min_length)
        better = better[match[better] > self._match[slot[better]]]
        # Of several matches of one slot the last is kept: the longest, and of equals the first in the text.
        better = better[np.lexsort((-begin[better], match[better]))]
        slot, begin = slot[better], begin[better]
        ends = np.cumsum(chunk.lengths + 1)
        document = np.searchsorted(ends, begin, side="right")
        self._match[slot] = match[better]
        self._document[slot] = chunk.document + document
        self._start[slot] = begin - (ends[document] - chunk.lengths[document] - 1) + chunk.start

    def overlaps(self) -> Overlaps:
        """Return the overlaps of the queries."""
        shared = self._suffixes.lcp_array()
        shared[shared < self._min_length] = 0
        match, source = self._match.copy(), np.arange(len(shared))  # the longest match of each slot, and its source
        _propagate_max(match, source, shared)
        _propagate_max(match[::-1], source[::-1], np.append(shared[1:], 0)[::-1])
        text, order = self._suffixes.text, self._suffixes.suffixes
        run, slot_of = np.zeros(len(text), np.int64), np.zeros(len(text), np.int64)
        run[order], slot_of[order] = match, source
        starts = np.cumsum(self._lengths + 1) - self._lengths - 1
        longest = np.maximum.reduceat(run, starts)
        query = np.repeat(np.arange(len(starts)), self._lengths + 1)
        best = np.flatnonzero(run == longest[query])
        best = best[np.unique(query[best], return_index=True)[1]]
        position = np.arange(len(text))
        covered = np.maximum.accumulate(position + run) > position
        none = longest == 0
        return Overlaps(
            length=longest,
            query_start=np.where(none, -1, best - starts),
            text_doc=np.where(none, -1, self._document[slot_of[best]]),
            text_start=np.where(none, -1, self._start[slot_of[best]]),
            covered=np.add.reduceat(covered.astype(np.int64), starts),
        )


def _propagate_max(match: np.ndarray, source: np.ndarray, shared: np.ndarray) -> None:
    """Spread matches to later slots in place, with their source.

    match[k] = max over j ≤ k of min(match[j], shared[j+1], …, shared[k]), by doubling: after step i each slot has seen
    the 2^i slots before it.
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
    """Hash the n tokens from each position.

    Returns uint64 [max(0, len − n + 1)]. Windows of twice the width combine two adjacent windows; the last combine two
    that overlap.
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
    hashes *= _HASH_MULTIPLIERS[0]  # the table is indexed by the top bits, which then depend on all others
    return hashes
