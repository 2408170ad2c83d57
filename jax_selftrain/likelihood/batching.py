"""How rows become device batches, and batches the units that are claimed, computed and committed together.

**Batches.** Every length has a fixed number of rows; the longest come first: if memory is short, it is short at once.
Places that a batch has left over are taken by the next shorter rows. In the last layer a batch computes only so many
positions of each row as something is asked at, in one of a few steps that are chosen like the lengths.

**Units.** Each device keeps the hidden states that predict something in a pool, in the order of batches, until the
next batch would not fit; only then are they projected to the vocabulary. A position of the pool holds up to `TARGETS`
tokens that are asked for there: the first tokens of all choices of a question cost one projection. What depends on a
token alone each device computes once for its different tokens (`models.known`), which must not be too many either. The
batches between two emptyings of the pool are a unit, which depends on nothing but the requests and the batch size: what
is claimed, committed and, after an interruption, found again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jax_selftrain.distributed.mesh import mesh_platform
from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.likelihood.prefix_trie import (
    COMPILE_COST,
    PackedTrie,
    SortedRequests,
    TokenizedRequest,
    choose_bucket_lengths,
    choose_packing,
)
from jax_selftrain.models import DecoderConfig

BUFFER_BATCHES = 4
"""How often the pool would hold all positions of a batch: the fuller it is, the less of its last chunk is empty."""
PROJECTION_CHUNK = 128
"""Pool positions that one device projects together: at V = 50k their fp32 logits take 26 MB, which a processor's cache
still holds (with 512 a position took a quarter more time)."""
UNIT_BATCHES = 16
SMALL_BATCHES = 64
UNIT_TOKENS = 1 << 15
"""A unit has up to `UNIT_BATCHES` batches, or `SMALL_BATCHES` as long as they have no more than so many positions on a
device: what may have to be done again after an interruption."""
MAX_UNIQUE_TOKENS = 1 << 13
"""Different tokens in a unit on one device, at most, unless one batch has more."""


@dataclass(frozen=True)
class BatchSpec:
    """Rows that fill the first places of one device batch."""

    length: int
    """Of its rows, padded."""
    num_queries: int
    """Positions of each row that its last layer computes."""
    rows: tuple[PackedTrie, ...]


@dataclass(frozen=True)
class WorkUnit:
    """Batches whose predictions fill the pool once."""

    index: int
    batches: tuple[BatchSpec, ...]
    unique_tokens: tuple[np.ndarray, ...]
    """Of each device along `data`, the different tokens of its rows, ascending."""

    @property
    def members(self) -> list[int]:
        """The requests in it."""
        return [member for batch in self.batches for row in batch.rows for member in row.request_ids]


def default_batch_tokens(rules: ShardingRules) -> int:
    """Enough to fill the device: more would only pad more rows, in the last batch of each length.

    On a CPU a token cost least in batches of 512 and as much in larger ones (the shape of Pythia-70m).
    """
    return (512 if mesh_platform(rules.mesh) == "cpu" else 8192) * rules.data_parallelism


def batch_rows(rules: ShardingRules, length: int, batch_tokens: int | None) -> int:
    """Rows of a batch of this length: about `batch_tokens` positions, and a multiple of the data axis."""
    return (
        max(1, (batch_tokens or default_batch_tokens(rules)) // (length * rules.data_parallelism))
        * rules.data_parallelism
    )


def buffer_size(rules: ShardingRules, max_positions: int, batch_tokens: int | None) -> int:
    """Places of the pool on each device, in whole chunks: `POOLED` times as many as a batch has positions."""
    per_device = (batch_tokens or default_batch_tokens(rules)) // rules.data_parallelism
    return -(-BUFFER_BATCHES * max(per_device, max_positions) // PROJECTION_CHUNK) * PROJECTION_CHUNK


def unique_token_capacity(vocab_size: int, different: int) -> int:
    """Tokens that each device has room to know, in whole chunks, where a unit has so many different ones: all, or
    `VOCABULARY` of them, or twice as many until there is room."""
    places = -(-min(vocab_size, MAX_UNIQUE_TOKENS) // PROJECTION_CHUNK) * PROJECTION_CHUNK
    while places < different:
        places *= 2
    return places


def plan_units(
    rules: ShardingRules, config: DecoderConfig, requests: Sequence[TokenizedRequest], batch_tokens: int | None
) -> list[WorkUnit]:
    """Divide distinct requests into units, longest rows first.

    Args:
      rules: of the model; only its number of replicas counts.
      config: of the model; no request is longer than its inputs, and its shape says what a position costs where.
      requests: all different.
      batch_tokens: token positions in one device batch.
    """
    if not requests:
        return []
    units: list[WorkUnit] = []
    batches: list[BatchSpec] = []
    nothing = (np.zeros(0, np.int32),) * rules.data_parallelism
    vocabularies, filled, positions = nothing, np.zeros(rules.data_parallelism, np.int64), 0
    room = buffer_size(rules, config.max_positions, batch_tokens)
    for batch in _batches(rules, config, requests, batch_tokens):
        rows = batch_rows(rules, batch.length, batch_tokens)
        more, new = queries_per_device(rules, batch, rows), unique_tokens_per_device(rules, batch, rows)
        both, wider = (
            tuple(map(np.union1d, vocabularies, new)),
            positions + batch.length * rows // rules.data_parallelism,
        )
        most = SMALL_BATCHES if wider <= UNIT_TOKENS else UNIT_BATCHES
        too_much = len(batches) >= most or (filled + more > room).any() or max(map(len, both)) > MAX_UNIQUE_TOKENS
        if batches and too_much:
            units.append(WorkUnit(len(units), tuple(batches), vocabularies))
            batches, both, filled, wider = [], new, np.zeros_like(filled), wider - positions
        batches.append(batch)
        vocabularies, filled, positions = both, filled + more, wider
    return [*units, WorkUnit(len(units), tuple(batches), vocabularies)]


def queries_per_device(rules: ShardingRules, batch: BatchSpec, rows: int) -> np.ndarray:
    """Places of the pool [S] that a batch of so many rows fills on each device along `data`."""
    counts = np.zeros(rows, np.int64)
    counts[: len(batch.rows)] = [len(row.query_positions) for row in batch.rows]
    return counts.reshape(rules.data_parallelism, -1).sum(axis=1)


def unique_tokens_per_device(rules: ShardingRules, batch: BatchSpec, rows: int) -> tuple[np.ndarray, ...]:
    """The different tokens, ascending, in a batch of so many rows on each device along `data`."""
    own = rows // rules.data_parallelism
    parts = (batch.rows[device * own : (device + 1) * own] for device in range(rules.data_parallelism))
    return tuple(np.unique(np.concatenate([np.zeros(0, np.int32), *(row.tokens for row in part)])) for part in parts)


def _batches(
    rules: ShardingRules, config: DecoderConfig, requests: Sequence[TokenizedRequest], batch_tokens: int | None
) -> Iterator[BatchSpec]:
    """The batches, longest first."""
    tokens = batch_tokens or default_batch_tokens(rules)
    rows, lengths = choose_packing(SortedRequests(requests), config, tokens)
    counts = np.array([len(row.query_positions) for row in rows], np.int64)
    computed = np.empty_like(counts)
    for length in np.unique(lengths).tolist():
        # Beside its keys and values, a sixth of it, the last layer is computed at these positions alone.
        mine = lengths == length
        computed[mine] = choose_bucket_lengths(
            counts[mine], length, lambda n: n * (5 / 6 / config.num_layers), COMPILE_COST * tokens
        )
    order = sorted(range(len(rows)), key=lambda at: (-lengths[at], -computed[at], -rows[at].size))
    start = 0
    while start < len(order):
        length = int(lengths[order[start]])
        taken = order[start : start + batch_rows(rules, length, batch_tokens)]
        start += len(taken)
        yield BatchSpec(length, int(computed[taken].max()), tuple(rows[at] for at in taken))
