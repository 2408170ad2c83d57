"""Which tokens of many requests are computed together: rows, batches and the units that batches form.

**Rows.** Requests that begin with the same tokens (the choices of a question, minimal pairs, questions behind the same
examples) share one row: their common beginning, the trunk, stands there once, and behind it what each adds, its
branch. Positions go on from the trunk in every branch, and a branch sees the trunk and itself alone, so that each
request is computed as if it stood alone (tree attention, as in SpecInfer, arXiv:2305.09781). Requests are sorted by
their tokens, which puts those that begin alike side by side, and a row takes the next one while that saves at least a
third of its tokens. Whoever asks twice for the same is answered from one computation.

**Batches.** Rows are padded to one of a few lengths, each with a fixed number of rows, the longest first: if memory is
short, it is short at once.

**Units.** Each device keeps the hidden states that predict something in a pool, in the order of batches, until the
next batch would not fit; only then are they projected to the vocabulary. A position of the pool holds up to `TARGETS`
tokens that are asked for there: the first tokens of all choices of a question cost one projection. The batches between
two emptyings of the pool are a unit, which depends on nothing but the requests and the batch size: what is claimed,
committed and, after an interruption, found again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jax_selftrain.mesh import Layout

SHORTEST = 16
"""Rows shorter than this are padded to it."""
CHUNK = 128
"""Pool positions that one device projects together: at V = 50k their fp32 logits take 26 MB, which a processor's cache
still holds (with 512 a position took a quarter more time)."""
TARGETS = 4
"""Tokens that one position of the pool can be asked for."""
FORKED = 256
"""Longest row that requests form together, unless one of them alone is more than half as long: attention over a row
grows with the square of its length, and what sharing saves does not."""
UNIT_BATCHES = 16
"""Batches in a unit at most: what may have to be done again after an interruption."""


@dataclass(frozen=True)
class Asked:
    """A request in one array."""

    tokens: np.ndarray
    """[n + 1] int32: the input, and one more token that is only predicted."""
    count: int
    """How many of the last tokens are asked for."""

    @property
    def key(self) -> tuple[bytes, int]:
        """Equal for equal requests; sorts those side by side that begin alike."""
        return self.tokens.astype(">i4").tobytes(), self.count


@dataclass(frozen=True)
class Row:
    """Requests that are computed together. P: places of the pool that the row fills."""

    members: tuple[int, ...]
    tokens: np.ndarray
    """[n] int32: the trunk, then the branches."""
    positions: np.ndarray
    """[n] int32."""
    branches: np.ndarray
    """[n] int32: 0 for the trunk, else the number of the branch."""
    slots: np.ndarray
    """[P] int32: the place in the row where each prediction is made."""
    targets: np.ndarray
    """[P, TARGETS] int32: the tokens asked for there (0 where there are fewer)."""
    answers: tuple[np.ndarray, ...]
    """For each member, [count, 2] int32: where its tokens stand in `targets`."""


@dataclass(frozen=True)
class Batch:
    """Rows that fill the first places of one device batch."""

    length: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Unit:
    """Batches whose predictions fill the pool once."""

    index: int
    batches: tuple[Batch, ...]

    @property
    def members(self) -> list[int]:
        """The requests in it."""
        return [member for batch in self.batches for row in batch.rows for member in row.members]


def bucket_lengths(max_positions: int) -> list[int]:
    """The row lengths that are compiled for: four to every doubling from 32 on, and the model's longest.

    Padding to powers of two alone made stories of 320 tokens twice as slow; two lengths to a doubling cost 24 % of
    padding on ARC-Easy and 22 % on LAMBADA, four 10 %.
    """
    steps = [(SHORTEST << k) * (4 + quarter) // 4 for k in range(max_positions.bit_length()) for quarter in range(4)]
    return [*(n for n in steps if n < max_positions and n % 8 == 0), max_positions]


def default_batch_tokens(layout: Layout) -> int:
    """Enough to fill the device: more would only pad more rows, in the last batch of each length.

    On a CPU a token cost least in batches of 512 and as much in larger ones (the shape of Pythia-70m).
    """
    return (512 if layout.mesh.devices.flat[0].platform == "cpu" else 8192) * layout.data


def batch_rows(layout: Layout, length: int, batch_tokens: int | None) -> int:
    """Rows of a batch of this length: about `batch_tokens` positions, and a multiple of the data axis."""
    return max(1, (batch_tokens or default_batch_tokens(layout)) // (length * layout.data)) * layout.data


def pool_places(layout: Layout, max_positions: int, batch_tokens: int | None) -> int:
    """Places of the pool on each device: every position of the largest batch, in whole chunks."""
    positions = max(
        batch_rows(layout, length, batch_tokens) // layout.data * length for length in bucket_lengths(max_positions)
    )
    return -(-positions // CHUNK) * CHUNK


def plan(layout: Layout, requests: Sequence[Asked], max_positions: int, batch_tokens: int | None) -> list[Unit]:
    """Divide distinct requests into units, longest rows first.

    Args:
      layout: of the model; only its number of replicas counts.
      requests: all different.
      max_positions: the model's longest input; no request has a longer one.
      batch_tokens: token positions in one device batch.
    """
    rows = [_row(requests, *group) for group in _groups(requests, max_positions)]
    units: list[Unit] = []
    batches: list[Batch] = []
    room = pool_places(layout, max_positions, batch_tokens)
    filled = np.zeros(layout.data, np.int64)
    for batch in _batches(layout, rows, max_positions, batch_tokens):
        more = places_per_device(layout, batch, batch_rows(layout, batch.length, batch_tokens))
        if len(batches) == UNIT_BATCHES or (filled + more > room).any():
            units.append(Unit(len(units), tuple(batches)))
            batches, filled = [], np.zeros_like(filled)
        batches.append(batch)
        filled += more
    return [*units, Unit(len(units), tuple(batches))] if batches else units


def places_per_device(layout: Layout, batch: Batch, rows: int) -> np.ndarray:
    """Places of the pool [S] that a batch of so many rows fills on each device along `data`."""
    counts = np.zeros(rows, np.int64)
    counts[: len(batch.rows)] = [len(row.slots) for row in batch.rows]
    return counts.reshape(layout.data, -1).sum(axis=1)


def _groups(requests: Sequence[Asked], max_positions: int) -> Iterator[tuple[list[int], int]]:
    """Requests that share a row, and how many tokens they share."""
    keys = [request.key for request in requests]
    group: list[int] = []
    trunk = length = longest = 0
    for index in sorted(range(len(requests)), key=keys.__getitem__):
        own = len(requests[index].tokens) - 1
        if group:
            # The common beginning of sorted sequences is that of neighbours, at its shortest.
            shared = min(trunk, _common(requests[group[-1]].tokens[:-1], requests[index].tokens[:-1]))
            joined = length + (len(group) - 1) * (trunk - shared) + own - shared
            limit = min(max_positions, max(FORKED, 2 * max(longest, own)))
            if 3 * (length + own - joined) >= own and joined <= limit:
                group.append(index)
                trunk, length, longest = shared, joined, max(longest, own)
                continue
            yield group, trunk
        group, trunk, length, longest = [index], own, own, own
    if group:
        yield group, trunk


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _row(requests: Sequence[Asked], members: list[int], trunk: int) -> Row:
    inputs = [requests[member].tokens[:-1] for member in members]
    own = [len(tokens) - trunk for tokens in inputs]
    starts = trunk + np.cumsum([0, *own])
    asked, wanted = [], []
    for member, tokens, start in zip(members, inputs, starts, strict=False):
        count = requests[member].count
        at = np.arange(len(tokens) - count, len(tokens))
        asked.append(np.where(at < trunk, at, at - trunk + start))
        wanted.append(requests[member].tokens[-count:])
    slots, targets, answers = _share(np.concatenate(asked), np.concatenate(wanted))
    return Row(
        members=tuple(members),
        tokens=np.concatenate([inputs[0][:trunk], *(tokens[trunk:] for tokens in inputs)]),
        positions=np.concatenate([np.arange(trunk), *(np.arange(trunk, trunk + n) for n in own)]).astype(np.int32),
        branches=np.repeat(np.arange(len(own) + 1), [trunk, *own]).astype(np.int32),
        slots=slots,
        targets=targets,
        answers=tuple(np.split(answers, np.cumsum([len(part) for part in asked])[:-1])),
    )


def _share(asked: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Let those who ask at the same place of a row share a place of the pool.

    Args:
      asked: [n], places of the row.
      wanted: [n], the token asked for at each.

    Returns:
      `slots` [P] and `targets` [P, TARGETS] of a `Row`, and where each pair stands in `targets` [n, 2].
    """
    pairs, inverse = np.unique(asked.astype(np.int64) << 32 | wanted, return_inverse=True)
    places, tokens = pairs >> 32, (pairs & 0xFFFFFFFF).astype(np.int32)
    new = np.diff(places, prepend=-1) != 0
    nth = np.arange(len(pairs)) - np.maximum.accumulate(np.where(new, np.arange(len(pairs)), 0))
    which = np.cumsum(nth % TARGETS == 0) - 1
    targets = np.zeros((which[-1] + 1, TARGETS), np.int32)
    targets[which, nth % TARGETS] = tokens
    slots = places[nth % TARGETS == 0].astype(np.int32)
    return slots, targets, np.stack([which, nth % TARGETS], axis=1).astype(np.int32)[inverse.reshape(-1)]


def _batches(layout: Layout, rows: Sequence[Row], max_positions: int, batch_tokens: int | None) -> Iterator[Batch]:
    """The batches, longest first."""
    buckets = bucket_lengths(max_positions)
    lengths = np.array([len(row.tokens) for row in rows], np.int64)
    padded = np.array(buckets)[np.searchsorted(buckets, lengths)]
    order = np.argsort(-lengths, kind="stable")
    for length in reversed(buckets):
        members = order[padded[order] == length].tolist()
        size = batch_rows(layout, length, batch_tokens)
        for start in range(0, len(members), size):
            yield Batch(length, tuple(rows[member] for member in members[start : start + size]))
