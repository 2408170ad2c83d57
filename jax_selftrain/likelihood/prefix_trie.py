"""Prefix tries of scoring requests, and their packing into rows.

**Tries.** A shared prefix (the context of choices, few-shot examples) is computed once. A row stores its requests as
tries, one node per token, in preorder. A token attends to its ancestors only, so a request gets the scores that it gets
alone (tree attention, SpecInfer, arXiv:2305.09781). Requests sorted by input have their shared prefixes next to each
other. A *group* of requests takes the next request while that saves a third of its tokens; groups are never divided.

**Rows.** `choose_packing` picks row lengths and packs groups into rows. It minimizes the estimated cost of padding,
attention over long rows, and compilation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from jax_selftrain.models import DecoderConfig

PACKED_LENGTHS = (128, 256, 512, 1024)
"""Row lengths that are tried for packing several groups into a row."""
LOOKAHEAD = 256
"""Number of following groups that are searched for one that fills a row."""
MAX_BUCKETS = 6
"""Maximum number of row lengths, and of query counts for each row length."""
COMPILE_COST = 1
"""Assumed cost of compiling one more program, in batches; low, because compiled programs are cached."""
MAX_TARGETS = 4
"""Maximum number of targets of one query position."""
MAX_GROUP_TOKENS = 256
"""Maximum size of a group, or twice its longest request: attention cost grows quadratically, savings linearly."""


@dataclass(frozen=True)
class TokenizedRequest:
    """A validated request in one array."""

    tokens: np.ndarray
    """[n + 1] int32: the input of n tokens, then one token that is only a target."""
    num_targets: int
    """Number of tokens at the end that are scored."""

    @property
    def input(self) -> np.ndarray:
        """Tokens that the model reads."""
        return self.tokens[:-1]

    @property
    def sort_key(self) -> tuple[bytes, bytes, int]:
        """Key that is equal for equal requests and orders requests by input."""
        tokens = self.tokens.astype(">i4").tobytes()
        return tokens[:-4], tokens, self.num_targets


@dataclass(frozen=True)
class PackedTrie:
    """A row: tries of requests, one after the other."""

    request_ids: tuple[int, ...]
    tokens: np.ndarray
    """[n] int32, in preorder."""
    positions: np.ndarray
    """[n] int32: depth of each token in its trie, from 0."""
    subtree_ends: np.ndarray
    """[n] int32: index after the last descendant of each token."""
    query_positions: np.ndarray
    """[Q] int32: indices of the tokens that predict a target."""
    targets: np.ndarray
    """[Q, MAX_TARGETS] int32: targets of each query position, padded with 0."""
    target_index: tuple[np.ndarray, ...]
    """For each request, [num_targets, 2] int32: indices of its targets in `targets`."""

    @property
    def size(self) -> int:
        """Length of the shortest row with room for tokens and queries."""
        return max(len(self.tokens), len(self.query_positions))


def round_up_to_bucket(length: int, max_positions: int) -> int:
    """Round a length up to a multiple of 8, 16 or 64."""
    step = 8 if length <= 128 else 16 if length <= 512 else 64
    return min(-(-length // step) * step, max_positions)


def adjacent_lcp(requests: Sequence[TokenizedRequest]) -> np.ndarray:
    """Return the common prefix length [n] of each input and the previous.

    For sorted requests, the minimum over a range is the common prefix of the range and its predecessor.
    """
    return np.array([0, *(_lcp(a.input, b.input) for a, b in pairwise(requests))], np.int64)


def group_by_prefix(requests: Sequence[TokenizedRequest], lcp: np.ndarray, max_positions: int) -> list[range]:
    """Divide sorted requests into groups that stay in one row."""
    groups: list[range] = []
    first = length = longest = targets = 0
    for i, (request, shared) in enumerate(zip(requests, lcp.tolist(), strict=True)):
        size, more = len(request.input), len(request.input) - shared
        limit = min(max_positions, max(MAX_GROUP_TOKENS, 2 * max(longest, size)))
        if i > first and 3 * shared >= size and length + more <= limit and targets + request.num_targets <= limit:
            length, longest, targets = length + more, max(longest, size), targets + request.num_targets
            continue
        if i:
            groups.append(range(first, i))
        first, length, longest, targets = i, size, size, request.num_targets
    return [*groups, range(first, len(requests))]


def _lcp(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def pack_trie(requests: Sequence[TokenizedRequest], lcp: np.ndarray, members: Sequence[int]) -> PackedTrie:
    """Build the row of some requests.

    Args:
      requests: sorted by `sort_key`.
      lcp: from `adjacent_lcp`.
      members: indices of the requests, ascending.
    """
    inputs = [requests[i].input for i in members]
    path = np.empty(max(map(len, inputs)), np.int64)  # row indices of the last input's tokens
    ends = np.empty(sum(map(len, inputs)), np.int32)
    tokens, positions, queries, targets = [], [], [], []
    before, n, last = inputs[0][:0], 0, -1
    for i, after in zip(members, inputs, strict=True):
        shared = int(lcp[i]) if i == last + 1 and n else _lcp(before, after)
        size, last, count = len(after), i, requests[i].num_targets
        ends[path[shared : len(before)]] = n
        path[shared:size] = np.arange(n, n + size - shared)
        tokens.append(after[shared:])
        positions.append(np.arange(shared, size, dtype=np.int32))
        queries.append(path[size - count : size].copy())
        targets.append(requests[i].tokens[-count:])
        before, n = after, n + size - shared
    ends[path[: len(before)]] = n
    query_positions, merged, index = _merge_query_positions(np.concatenate(queries), np.concatenate(targets))
    starts = np.cumsum([0, *map(len, queries)]).tolist()
    return PackedTrie(
        request_ids=tuple(members),
        tokens=np.concatenate(tokens),
        positions=np.concatenate(positions),
        subtree_ends=ends[:n],
        query_positions=query_positions,
        targets=merged,
        target_index=tuple(index[a:b] for a, b in pairwise(starts)),
    )


def _merge_query_positions(positions: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merge up to `MAX_TARGETS` targets [n] of one position [n].

    Returns `query_positions` [Q] and `targets` [Q, MAX_TARGETS] of the row, and the index of each pair in `targets`.
    """
    pairs, inverse = np.unique(positions.astype(np.int64) << 32 | targets, return_inverse=True)
    positions, tokens = pairs >> 32, (pairs & 0xFFFFFFFF).astype(np.int32)
    new = np.diff(positions, prepend=-1) != 0
    nth = np.arange(len(pairs)) - np.maximum.accumulate(np.where(new, np.arange(len(pairs)), 0))
    column = nth % MAX_TARGETS
    query = np.cumsum(column == 0) - 1
    merged = np.zeros((query[-1] + 1, MAX_TARGETS), np.int32)
    merged[query, column] = tokens
    index = np.stack([query, column], axis=1).astype(np.int32)
    return positions[column == 0].astype(np.int32), merged, index[inverse.reshape(-1)]


def choose_packing(
    requests: Sequence[TokenizedRequest], config: DecoderConfig, batch_tokens: int
) -> tuple[list[PackedTrie], np.ndarray]:
    """Pack sorted requests into rows, and choose padded lengths [rows].

    The matmuls of a token cost 12 D² multiplications in a layer of the usual shape. Attention over a row of n tokens
    costs 2 n D more, and its softmax about as much again (Pythia-70m on a CPU: rows of 256 took a tenth more time per
    token than rows of 88).
    """

    def price(lengths: np.ndarray) -> np.ndarray:
        return lengths * (1 + lengths / (3 * config.hidden_size))

    lcp = adjacent_lcp(requests)
    groups = group_by_prefix(requests, lcp, config.max_positions)
    alone = [pack_trie(requests, lcp, group) for group in groups]
    sizes = measure_groups(lcp, groups, alone)
    best: tuple[float, list[list[int]], np.ndarray] | None = None
    for capacity in (0, *(length for length in PACKED_LENGTHS if length <= config.max_positions)):
        packing, filled = bin_pack(*sizes, capacity)
        lengths = choose_bucket_lengths(filled, config.max_positions, price, COMPILE_COST * batch_tokens)
        cost = float(price(lengths).sum()) + COMPILE_COST * batch_tokens * len(np.unique(lengths))
        if best is None or cost < best[0]:
            best = cost, packing, lengths
    assert best is not None
    _, packing, lengths = best
    return [
        alone[row[0]] if len(row) == 1 else pack_trie(requests, lcp, [i for group in row for i in groups[group]])
        for row in packing
    ], lengths


def measure_groups(
    lcp: np.ndarray, groups: Sequence[range], alone: Sequence[PackedTrie]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the first four arguments of `bin_pack`, each [groups] int64."""
    return (
        np.array([len(row.tokens) for row in alone], np.int64),
        np.array([len(row.query_positions) for row in alone], np.int64),
        lcp[[group[0] for group in groups]],
        np.array([lcp[group.start : group.stop].min() for group in groups], np.int64),
    )


def bin_pack(
    tokens: np.ndarray, queries: np.ndarray, shared: np.ndarray, lcp_through: np.ndarray, capacity: int
) -> tuple[list[list[int]], np.ndarray]:
    """Pack groups into rows of a capacity.

    A larger group gets its own row. A row takes the next groups in order while that leaves room for one of median size,
    then the largest of the next `LOOKAHEAD` that fits, and so on.

    Args:
      tokens, queries: [n], number of each in a group alone; a row must have room for both.
      shared: [n], number of tokens that a group saves after the previous group.
      lcp_through: [n], at most `shared`: prefix length that the whole group shares with the previous one. After an
        earlier group, a group saves the minimum of its `shared` and the `lcp_through` of all groups between.
      capacity: 0 gives each group its own row.

    Returns:
      The groups of each row, ascending, and an upper bound of the room that they need [rows].
    """
    rows, filled = [], []
    median = float(np.median(tokens))
    known = min(LOOKAHEAD, len(tokens))
    ahead = np.arange(known)

    def take(which: int) -> int:
        nonlocal ahead, known
        group, ahead = int(ahead[which]), np.delete(ahead, which)
        if known < len(tokens):
            ahead, known = np.append(ahead, known), known + 1
        return group

    while len(ahead):
        last = take(0)
        row, need = [last], int(max(tokens[last], queries[last]))
        while len(ahead):
            kept = np.minimum.accumulate(np.append(tokens[last], lcp_through[last + 1 : ahead[-1]]))
            common = np.minimum(kept[ahead - last - 1], shared[ahead])
            more = np.maximum(tokens[ahead] - common, queries[ahead])
            fitting = np.where(need + more <= capacity, more, 0)
            which = 0 if fitting[0] and need + more[0] + median <= capacity else int(np.argmax(fitting))
            if not fitting[which]:
                break
            need += int(more[which])
            row.append(take(which))
            if which == 0:
                last = row[-1]
        rows.append(sorted(row))
        filled.append(need)
    return rows, np.array(filled, np.int64)


def choose_bucket_lengths(
    sizes: np.ndarray, max_positions: int, price: Callable[[np.ndarray], np.ndarray], compile_cost: float
) -> np.ndarray:
    """Choose the padded length of each size at minimum cost.

    There are at most `MAX_BUCKETS` lengths. Dynamic programming: the minimum cost of the first j different sizes with k
    lengths.
    """
    if not len(sizes):
        return sizes
    fine = np.array([round_up_to_bucket(int(size), max_positions) for size in sizes])
    ends, which, counts = np.unique(fine, return_inverse=True, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    group = price(ends)[None, :] * np.maximum(before[None, 1:] - before[:-1, None], 0) + compile_cost  # [first, last]
    group = np.where(np.arange(len(ends))[:, None] <= np.arange(len(ends)), group, np.inf)
    costs, chosen = [np.concatenate([[0.0], np.full(len(ends), np.inf)])], []
    for _ in range(min(MAX_BUCKETS, len(ends))):
        options = costs[-1][:-1, None] + group
        chosen.append(options.argmin(axis=0))
        costs.append(np.concatenate([[np.inf], options.min(axis=0)]))
    best = int(np.argmin([cost[-1] for cost in costs[1:]]))
    padded, last = np.empty_like(ends), len(ends)
    for k in range(best, -1, -1):
        first = int(chosen[k][last - 1])
        padded[first:last] = ends[last - 1]
        last = first
    return padded[which.reshape(-1)]
