"""Which tokens of many requests are computed together: trees of requests, and the rows that hold them.

**Trees.** What requests begin with alike (the choices of a question, minimal pairs, questions behind the same examples)
is computed once. A row holds its requests as a tree, one node a token, in preorder: each request is a path from a root,
and a token sees those on its path alone, so that each request is computed as if it stood alone (tree attention, as in
SpecInfer, arXiv:2305.09781). Sorting requests by their tokens puts those that begin alike side by side. A *family* of
them is never divided: it takes the next one while that saves at least a third of its tokens. Whoever asks twice for the
same is answered from one computation.

**Rows.** How long rows are, and whether several families share them, is chosen for the requests at hand (`rows_of`):
as cheap as possible, counting padding, the attention of long rows and the compilation of each length. Families fill a
row in their order, so that neighbors share the few tokens that they begin with; its end is filled by the largest of
the following that fit. How rows become batches is `scoring.units`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from jax_selftrain.models import DecoderConfig

PACKED_LENGTHS = (128, 256, 512, 1024)
"""Lengths of rows that are tried for several families together."""
LOOKAHEAD = 256
"""Families ahead, in their order, among which one is looked for that fills a row."""
MAX_BUCKETS = 6
"""Row lengths at most; also, for one length, numbers of positions that the last layer computes."""
COMPILE_COST = 1
"""What compiling one more program is taken to cost, in batches: once, since programs are kept."""
MAX_TARGETS = 4
"""Tokens that one position of the pool can be asked for."""
MAX_GROUP_TOKENS = 256
"""Longest family, unless one of its requests alone is more than half as long: attention over a row grows with the
square of its length, and what sharing saves does not."""


@dataclass(frozen=True)
class TokenizedRequest:
    """A request in one array."""

    tokens: np.ndarray
    """[n + 1] int32: the input, and one more token that is only predicted."""
    num_targets: int
    """How many of the last tokens are asked for."""

    @property
    def key(self) -> tuple[bytes, int]:
        """Equal for equal requests; sorts those side by side that begin alike."""
        return self.tokens.astype(">i4").tobytes(), self.num_targets


@dataclass(frozen=True)
class PackedTrie:
    """Trees that stand side by side. P: places of the pool that the row fills."""

    request_ids: tuple[int, ...]
    tokens: np.ndarray
    """[n] int32, in preorder."""
    positions: np.ndarray
    """[n] int32: depth of each token, from 0."""
    subtree_ends: np.ndarray
    """[n] int32: the place behind the last token that goes on from this one, which is seen from all of them."""
    query_positions: np.ndarray
    """[P] int32: the place in the row where each prediction is made."""
    targets: np.ndarray
    """[P, TARGETS] int32: the tokens asked for there (0 where there are fewer)."""
    target_index: tuple[np.ndarray, ...]
    """For each member, [count, 2] int32: where its tokens stand in `targets`."""

    @property
    def size(self) -> int:
        """The shortest row that it fits in; its pool places do, too."""
        return max(len(self.tokens), len(self.query_positions))


def round_up_to_bucket(length: int, max_positions: int) -> int:
    """The next length that programs are compiled for: multiples of 8, of 16 from 128 on, of 64 from 512 on."""
    step = 8 if length <= 128 else 16 if length <= 512 else 64
    return min(-(-length // step) * step, max_positions)


class SortedRequests:
    """Requests in the order of their inputs, which puts those that begin alike side by side."""

    def __init__(self, requests: Sequence[TokenizedRequest]):
        inputs = [asked.tokens[:-1] for asked in requests]
        keys = [tokens.astype(">i4").tobytes() for tokens in inputs]
        self.order = sorted(range(len(requests)), key=lambda index: (keys[index], *requests[index].key))
        self.requests = [requests[index] for index in self.order]
        self.inputs = [inputs[index] for index in self.order]
        self.shared = np.array([0, *map(_lcp, self.inputs, self.inputs[1:])], np.int64)
        """How many tokens each begins with as the one before it does; of two that are apart, the smallest between."""


def group_by_prefix(requests: SortedRequests, max_positions: int) -> list[range]:
    """Requests, by their places in the order, that are not to be divided."""
    found: list[range] = []
    first = length = longest = asked = 0
    for at, (request, tokens, shared) in enumerate(
        zip(requests.requests, requests.inputs, requests.shared.tolist(), strict=True)
    ):
        own = len(tokens)
        limit = min(max_positions, max(MAX_GROUP_TOKENS, 2 * max(longest, own)))
        if at > first and 3 * shared >= own and length + own - shared <= limit and asked + request.num_targets <= limit:
            length, longest, asked = length + own - shared, max(longest, own), asked + request.num_targets
            continue
        if at:
            found.append(range(first, at))
        first, length, longest, asked = at, own, own, request.num_targets
    return [*found, range(first, len(requests.order))]


def _lcp(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def pack_trie(requests: SortedRequests, members: Sequence[int]) -> PackedTrie:
    """A row of requests, given by their places in the order, ascending."""
    path = np.empty(max(len(requests.inputs[at]) for at in members), np.int64)  # places of the last input's tokens
    ends = np.empty(sum(len(requests.inputs[at]) for at in members), np.int32)
    tokens, positions, asked, wanted = [], [], [], []
    before, n, last = requests.inputs[members[0]][:0], 0, -1
    for at in members:
        request, after = requests.requests[at], requests.inputs[at]
        lcp = int(requests.shared[at]) if at == last + 1 and n else _lcp(before, after)
        own, last = len(after), at
        ends[path[lcp : len(before)]] = n
        path[lcp:own] = np.arange(n, n + own - lcp)
        tokens.append(after[lcp:])
        positions.append(np.arange(lcp, own, dtype=np.int32))
        asked.append(path[own - request.num_targets : own].copy())
        wanted.append(request.tokens[-request.num_targets :])
        before, n = after, n + own - lcp
    ends[path[: len(before)]] = n
    slots, targets, answers = _merge_query_positions(np.concatenate(asked), np.concatenate(wanted))
    starts = np.cumsum([0, *(len(part) for part in asked)]).tolist()
    return PackedTrie(
        request_ids=tuple(requests.order[at] for at in members),
        tokens=np.concatenate(tokens),
        positions=np.concatenate(positions),
        subtree_ends=ends[:n],
        query_positions=slots,
        targets=targets,
        target_index=tuple(answers[a:b] for a, b in pairwise(starts)),
    )


def _merge_query_positions(asked: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
    which = np.cumsum(nth % MAX_TARGETS == 0) - 1
    targets = np.zeros((which[-1] + 1, MAX_TARGETS), np.int32)
    targets[which, nth % MAX_TARGETS] = tokens
    slots = places[nth % MAX_TARGETS == 0].astype(np.int32)
    return slots, targets, np.stack([which, nth % MAX_TARGETS], axis=1).astype(np.int32)[inverse.reshape(-1)]


def choose_packing(
    requests: SortedRequests, config: DecoderConfig, batch_tokens: int
) -> tuple[list[PackedTrie], np.ndarray]:
    """Rows, and the length [rows] that each is padded to: the cheapest of a few ways to divide the requests.

    Beside a token's products with the weights (12 D² multiplications in a layer of the usual shape), its attention
    over a row of n tokens costs 2 n D, and its softmax about as much again (shape of Pythia-70m on a CPU: rows of 256
    took a tenth more time per token than rows of 88).
    """

    def price(lengths: np.ndarray) -> np.ndarray:
        return lengths * (1 + lengths / (3 * config.hidden_size))

    undivided = group_by_prefix(requests, config.max_positions)
    alone = [pack_trie(requests, family) for family in undivided]
    items = estimate_cost(requests, undivided, alone)
    best: tuple[float, list[list[int]], np.ndarray] | None = None
    for capacity in (0, *(length for length in PACKED_LENGTHS if length <= config.max_positions)):
        together, filled = bin_pack(*items, capacity)
        lengths = choose_bucket_lengths(filled, config.max_positions, price, COMPILE_COST * batch_tokens)
        cost = float(price(lengths).sum()) + COMPILE_COST * batch_tokens * len(np.unique(lengths))
        if best is None or cost < best[0]:
            best = cost, together, lengths
    assert best is not None
    _, together, lengths = best
    return [
        alone[members[0]]
        if len(members) == 1
        else pack_trie(requests, [at for member in members for at in undivided[member]])
        for members in together
    ], lengths


def estimate_cost(
    requests: SortedRequests, undivided: Sequence[range], alone: Sequence[PackedTrie]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What `packed` must know of families: [n] tokens, places, shared, through."""
    return (
        np.array([len(row.tokens) for row in alone], np.int64),
        np.array([len(row.query_positions) for row in alone], np.int64),
        requests.shared[[family[0] for family in undivided]],
        np.array([requests.shared[family.start : family.stop].min() for family in undivided], np.int64),
    )


def bin_pack(
    tokens: np.ndarray, targets: np.ndarray, shared: np.ndarray, lcp_through: np.ndarray, capacity: int
) -> tuple[list[list[int]], np.ndarray]:
    """Which items share a row of this capacity (a larger item has its own).

    A row takes the next items in their order while that leaves room for one of middle size, then the largest that fits
    of the `WINDOW` ahead, and so on.

    Args:
      tokens, places: [n], of each item alone; a row must have room for both.
      shared: [n], how many tokens fewer it takes behind the item before it.
      through: [n], at most `shared`: what still holds behind it of what was shared before it. Behind an earlier item,
        one takes as many tokens fewer as the least of its own `shared` and the `through` of all between.
      capacity: 0 gives each item its own row.

    Returns:
      The items of each row, ascending, and the room that they need at most [rows].
    """
    rows, filled = [], []
    usual = float(np.median(tokens))
    known = min(LOOKAHEAD, len(tokens))
    ahead = np.arange(known)

    def taken(which: int) -> int:
        nonlocal ahead, known
        item, ahead = int(ahead[which]), np.delete(ahead, which)
        if known < len(tokens):
            ahead, known = np.append(ahead, known), known + 1
        return item

    while len(ahead):
        last = taken(0)
        row, need = [last], int(max(tokens[last], targets[last]))
        while len(ahead):
            kept = np.minimum.accumulate(np.append(tokens[last], lcp_through[last + 1 : ahead[-1]]))
            common = np.minimum(kept[ahead - last - 1], shared[ahead])
            more = np.maximum(tokens[ahead] - common, targets[ahead])
            fitting = np.where(need + more <= capacity, more, 0)
            which = 0 if fitting[0] and need + more[0] + usual <= capacity else int(np.argmax(fitting))
            if not fitting[which]:
                break
            need += int(more[which])
            row.append(taken(which))
            if which == 0:
                last = row[-1]
        rows.append(sorted(row))
        filled.append(need)
    return rows, np.array(filled, np.int64)


def choose_bucket_lengths(
    sizes: np.ndarray, max_positions: int, price: Callable[[np.ndarray], np.ndarray], compiling: float
) -> np.ndarray:
    """What each size is padded to, out of at most `LENGTHS` different lengths: the cheapest choice.

    Dynamic programming over the different sizes: the cheapest way to serve the first j of them with k lengths.
    """
    if not len(sizes):
        return sizes
    fine = np.array([round_up_to_bucket(int(size), max_positions) for size in sizes])
    ends, which, counts = np.unique(fine, return_inverse=True, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    group = price(ends)[None, :] * np.maximum(before[None, 1:] - before[:-1, None], 0) + compiling  # [first, last]
    group = np.where(np.arange(len(ends))[:, None] <= np.arange(len(ends)), group, np.inf)
    costs, chosen = [np.concatenate([[0.0], np.full(len(ends), np.inf)])], []
    for _ in range(min(MAX_BUCKETS, len(ends))):
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
