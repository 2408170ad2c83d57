"""Which tokens of many requests are computed together: trees, rows, batches and the units that batches form.

**Trees.** Requests that begin with the same tokens (the choices of a question, minimal pairs, questions behind the same
examples) form a tree: their common beginning, the trunk, stands there once, and behind it what each adds, its branch.
Positions go on from the trunk in every branch, and a branch sees the trunk and itself alone, so that each request is
computed as if it stood alone (tree attention, as in SpecInfer, arXiv:2305.09781). Requests are sorted by their tokens,
which puts those that begin alike side by side, and a tree takes the next one while that saves at least a third of its
tokens. Whoever asks twice for the same is answered from one computation.

**Rows.** Trees may stand side by side in a row, as segments that do not see each other. How long rows are, and whether
they hold several trees, is chosen for the requests at hand (`_rows`): as cheap as possible, counting padding, the
attention of long rows and the compilation of each length.

**Batches.** Every length has a fixed number of rows; the longest come first: if memory is short, it is short at once.
Places that a batch has left over are taken by the next shorter rows. In the last layer a batch computes only so many
positions of each row as something is asked at, in one of a few steps (`QUOTAS`).

**Units.** Each device keeps the hidden states that predict something in a pool, in the order of batches, until the
next batch would not fit; only then are they projected to the vocabulary. A position of the pool holds up to `TARGETS`
tokens that are asked for there: the first tokens of all choices of a question cost one projection. The batches between
two emptyings of the pool are a unit, which depends on nothing but the requests and the batch size: what is claimed,
committed and, after an interruption, found again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jax_selftrain.mesh import Layout, platform_of

PACKED = (128, 256, 512, 1024)
"""Lengths of rows that are tried for several trees side by side."""
LENGTHS = 6
"""Row lengths at most."""
COMPILING = 1
"""What compiling for one more length is taken to cost, in batches: once, since programs are kept."""
QUOTAS = (8, 4, 2, 1)
"""A batch computes the last layer at an eighth, a quarter, a half or all of its positions."""
POOLED = 4
"""How often the pool would hold all positions of a batch: the fuller it is, the less of its last chunk is empty."""
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
    """One tree, or several side by side. P: places of the pool that the row fills."""

    members: tuple[int, ...]
    tokens: np.ndarray
    """[n] int32: of each tree the trunk, then the branches."""
    positions: np.ndarray
    """[n] int32, from 0 in each tree."""
    segments: np.ndarray
    """[n] int32: the number of the tree, from 1."""
    branches: np.ndarray
    """[n] int32: 0 for a trunk, else the number of the branch in its tree."""
    slots: np.ndarray
    """[P] int32: the place in the row where each prediction is made."""
    targets: np.ndarray
    """[P, TARGETS] int32: the tokens asked for there (0 where there are fewer)."""
    answers: tuple[np.ndarray, ...]
    """For each member, [count, 2] int32: where its tokens stand in `targets`."""

    @property
    def size(self) -> int:
        """The shortest row that it fits in; its pool places do, too."""
        return max(len(self.tokens), len(self.slots))


@dataclass(frozen=True)
class Batch:
    """Rows that fill the first places of one device batch."""

    length: int
    """Of its rows, padded."""
    asked: int
    """Positions of each row that its last layer computes."""
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


def aligned(length: int, max_positions: int) -> int:
    """The next length that programs are compiled for: multiples of 8, of 16 from 128 on, of 64 from 512 on."""
    step = 8 if length <= 128 else 16 if length <= 512 else 64
    return min(-(-length // step) * step, max_positions)


def default_batch_tokens(layout: Layout) -> int:
    """Enough to fill the device: more would only pad more rows, in the last batch of each length.

    On a CPU a token cost least in batches of 512 and as much in larger ones (the shape of Pythia-70m).
    """
    return (512 if platform_of(layout.mesh) == "cpu" else 8192) * layout.data


def batch_rows(layout: Layout, length: int, batch_tokens: int | None) -> int:
    """Rows of a batch of this length: about `batch_tokens` positions, and a multiple of the data axis."""
    return max(1, (batch_tokens or default_batch_tokens(layout)) // (length * layout.data)) * layout.data


def pool_places(layout: Layout, max_positions: int, batch_tokens: int | None) -> int:
    """Places of the pool on each device, in whole chunks: `POOLED` times as many as a batch has positions."""
    per_device = (batch_tokens or default_batch_tokens(layout)) // layout.data
    return -(-POOLED * max(per_device, max_positions) // CHUNK) * CHUNK


def plan(
    layout: Layout, requests: Sequence[Asked], max_positions: int, width: int, batch_tokens: int | None
) -> list[Unit]:
    """Divide distinct requests into units, longest rows first.

    Args:
      layout: of the model; only its number of replicas counts.
      requests: all different.
      max_positions: the model's longest input; no request has a longer one.
      width: D of the model, which says what attention costs beside the weights.
      batch_tokens: token positions in one device batch.
    """
    trees = [_tree(requests, *group) for group in _groups(requests, max_positions)]
    units: list[Unit] = []
    batches: list[Batch] = []
    room = pool_places(layout, max_positions, batch_tokens)
    filled = np.zeros(layout.data, np.int64)
    for batch in _batches(layout, trees, max_positions, width, batch_tokens):
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
    """Requests that form a tree, and how many tokens they share."""
    keys = [request.key for request in requests]
    group: list[int] = []
    trunk = length = longest = asked = 0
    for index in sorted(range(len(requests)), key=keys.__getitem__):
        own, count = len(requests[index].tokens) - 1, requests[index].count
        if group:
            # The common beginning of sorted sequences is that of neighbours, at its shortest.
            shared = min(trunk, _common(requests[group[-1]].tokens[:-1], requests[index].tokens[:-1]))
            joined = length + (len(group) - 1) * (trunk - shared) + own - shared
            limit = min(max_positions, max(FORKED, 2 * max(longest, own)))
            if 3 * (length + own - joined) >= own and joined <= limit and asked + count <= limit:
                group.append(index)
                trunk, length, longest, asked = shared, joined, max(longest, own), asked + count
                continue
            yield group, trunk
        group, trunk, length, longest, asked = [index], own, own, own, count
    if group:
        yield group, trunk


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _tree(requests: Sequence[Asked], members: list[int], trunk: int) -> Row:
    """A row of requests that share their first `trunk` tokens."""
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
        segments=np.ones(trunk + sum(own), np.int32),
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


def _side_by_side(trees: Sequence[Row]) -> Row:
    """One row of several trees."""
    if len(trees) == 1:
        return trees[0]
    starts = np.cumsum([0, *(len(tree.tokens) for tree in trees)])
    places = np.cumsum([0, *(len(tree.slots) for tree in trees)])
    return Row(
        members=tuple(member for tree in trees for member in tree.members),
        tokens=np.concatenate([tree.tokens for tree in trees]),
        positions=np.concatenate([tree.positions for tree in trees]),
        segments=np.repeat(np.arange(1, len(trees) + 1), np.diff(starts)).astype(np.int32),
        branches=np.concatenate([tree.branches for tree in trees]),
        slots=np.concatenate([tree.slots + start for tree, start in zip(trees, starts, strict=False)]),
        targets=np.concatenate([tree.targets for tree in trees]),
        answers=tuple(
            at + np.array([place, 0], np.int32)
            for tree, place in zip(trees, places.astype(np.int32), strict=False)
            for at in tree.answers
        ),
    )


def _batches(
    layout: Layout, trees: Sequence[Row], max_positions: int, width: int, batch_tokens: int | None
) -> Iterator[Batch]:
    """The batches, longest first."""
    tokens = batch_tokens or default_batch_tokens(layout)
    rows, lengths = _rows(trees, max_positions, width, tokens)

    def quota(row: Row, length: int) -> int:
        """Positions for the last layer to compute: the smallest step that covers what is asked at."""
        return next(step for step in (-(-length // part) for part in QUOTAS) if len(row.slots) <= step)

    order = sorted(range(len(rows)), key=lambda at: (-lengths[at], -quota(rows[at], lengths[at]), -rows[at].size))
    start = 0
    while start < len(order):
        length = lengths[order[start]]
        taken = [rows[at] for at in order[start : start + batch_rows(layout, length, batch_tokens)]]
        start += len(taken)
        yield Batch(length, max(quota(row, length) for row in taken), tuple(taken))


def _rows(trees: Sequence[Row], max_positions: int, width: int, batch_tokens: int) -> tuple[list[Row], list[int]]:
    """Rows of trees, and the length that each is padded to: the cheapest of a few ways to divide them.

    Beside a token's products with the weights (12 D² multiplications in a layer of the usual shape), its attention
    over a row of n tokens costs 2 n D, and its softmax about as much again (shape of Pythia-70m on a CPU: rows of 256
    took a tenth more time per token than rows of 88).
    """

    def price(lengths: np.ndarray) -> np.ndarray:
        return lengths * (1 + lengths / (3 * width))

    sizes = np.array([tree.size for tree in trees], np.int64)
    best: tuple[float, list[list[int]], np.ndarray] | None = None
    for capacity in (0, *(length for length in PACKED if length <= max_positions)):
        shared = packed(sizes, capacity) if capacity else [[tree] for tree in range(len(trees))]
        filled = np.array([sizes[members].sum() for members in shared], np.int64)
        lengths = padded(filled, max_positions, price, COMPILING * batch_tokens)
        cost = float(price(lengths).sum()) + COMPILING * batch_tokens * len(np.unique(lengths))
        if best is None or cost < best[0]:
            best = cost, shared, lengths
    assert best is not None
    _, shared, lengths = best
    return [_side_by_side([trees[tree] for tree in members]) for members in shared], lengths.tolist()


def packed(sizes: np.ndarray, capacity: int) -> list[list[int]]:
    """Which items lie together in bins of this capacity (a larger item has its own): best fit, largest first."""
    bins: list[list[int]] = []
    open_at: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by the room that they have left
    count = np.zeros(capacity + 1, np.int64)
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        fitting = np.flatnonzero(count[size:]) if size <= capacity else np.empty(0, np.int64)
        if len(fitting):
            room = size + int(fitting[0])
            number = open_at[room].pop()
            count[room] -= 1
            bins[number].append(item)
        else:
            room, number = max(capacity, size), len(bins)
            bins.append([item])
        if room - size:
            open_at[room - size].append(number)
            count[room - size] += 1
    return bins


def padded(
    sizes: np.ndarray, max_positions: int, price: Callable[[np.ndarray], np.ndarray], compiling: float
) -> np.ndarray:
    """The length that each row is padded to, out of at most `LENGTHS` different ones: the cheapest choice.

    Dynamic programming over the different sizes: the cheapest way to serve the first j of them with k lengths.
    """
    if not len(sizes):
        return sizes
    fine = np.array([aligned(int(size), max_positions) for size in sizes])
    ends, which, counts = np.unique(fine, return_inverse=True, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    group = price(ends)[None, :] * np.maximum(before[None, 1:] - before[:-1, None], 0) + compiling  # [first, last]
    group = np.where(np.arange(len(ends))[:, None] <= np.arange(len(ends)), group, np.inf)
    costs, chosen = [np.concatenate([[0.0], np.full(len(ends), np.inf)])], []
    for _ in range(min(LENGTHS, len(ends))):
        options = costs[-1][:-1, None] + group
        chosen.append(options.argmin(axis=0))
        costs.append(np.concatenate([[np.inf], options.min(axis=0)]))
    used = int(np.argmin([cost[-1] for cost in costs[1:]]))
    padded, last = np.empty_like(ends), len(ends)
    for k in range(used, -1, -1):
        first = int(chosen[k][last - 1])
        padded[first:last] = ends[last - 1]
        last = first
    return padded[which.reshape(-1)]
