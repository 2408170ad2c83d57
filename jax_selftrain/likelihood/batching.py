"""Device batches of rows, and work units of batches.

**Batches.** Every row length has a fixed number of rows per batch. The longest rows come first, so that a lack of
memory shows at once. The last layer of a batch computes a fixed number of query positions of each row.

**Work units.** Each device collects the hidden states of query positions in a buffer until the next batch does not fit;
then it projects them to the vocabulary. The batches between two projections are a work unit. First-layer activations
are precomputed once for each unique token of a unit (`models.token_precompute`), so their number is bounded, too. A
unit depends only on the requests and the batch size, so it can be committed and found again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jax_selftrain.distributed.mesh import mesh_platform
from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.likelihood.prefix_trie import (
    COMPILE_COST,
    PackedTrie,
    TokenizedRequest,
    choose_bucket_lengths,
    choose_packing,
)
from jax_selftrain.models import DecoderConfig

BUFFER_BATCHES = 4
"""Size of the buffer in batches whose positions are all queries; a large buffer wastes less of its last chunk."""
PROJECTION_CHUNK = 128
"""Query positions that a device projects together: at V = 50k their fp32 logits take 26 MB, which fits the cache of a
CPU (with 512 a position took a quarter more time)."""
UNIT_BATCHES = 16
"""Maximum number of batches in a unit with more than `UNIT_TOKENS` positions on a device."""
SMALL_BATCHES = 64
"""Maximum number of batches in a smaller unit."""
UNIT_TOKENS = 1 << 15
"""Bound on the work that is lost at an interruption; see `UNIT_BATCHES`."""
MAX_UNIQUE_TOKENS = 1 << 13
"""Maximum number of unique tokens of a unit on one device, unless one batch has more."""


@dataclass(frozen=True)
class BatchSpec:
    """Rows of one device batch; missing rows are padding."""

    length: int
    """Padded length of the rows."""
    rows_per_device: int
    num_queries: int
    """Number of positions of each row that the last layer computes."""
    rows: tuple[PackedTrie, ...]


@dataclass(frozen=True)
class WorkUnit:
    """Batches whose query positions fill the buffer once."""

    index: int
    batches: tuple[BatchSpec, ...]
    unique_tokens: tuple[np.ndarray, ...]
    """For each device along `data`, the unique tokens of its rows, ascending."""

    @property
    def request_ids(self) -> list[int]:
        """Ids of the requests in the unit."""
        return [i for batch in self.batches for row in batch.rows for i in row.request_ids]


def default_batch_tokens(rules: ShardingRules) -> int:
    """Return the number of positions that fill the devices.

    A larger batch only adds padding to the last batch of each length. On a CPU a token of Pythia-70m cost least in
    batches of 512, and as much in larger ones.
    """
    return (512 if mesh_platform(rules.mesh) == "cpu" else 8192) * rules.data_parallelism


def batch_rows(rules: ShardingRules, length: int, batch_tokens: int | None) -> int:
    """Return the batch size in rows, a multiple of the data axis."""
    per_device = (batch_tokens or default_batch_tokens(rules)) // (length * rules.data_parallelism)
    return max(1, per_device) * rules.data_parallelism


def buffer_size(rules: ShardingRules, max_positions: int, batch_tokens: int | None) -> int:
    """Return the number N of buffer slots per device, in whole chunks."""
    per_device = (batch_tokens or default_batch_tokens(rules)) // rules.data_parallelism
    return -(-BUFFER_BATCHES * max(per_device, max_positions) // PROJECTION_CHUNK) * PROJECTION_CHUNK


def unique_token_capacity(vocab_size: int, num_unique: int) -> int:
    """Return the number W of unique tokens that fit a device.

    It is the vocabulary size or `MAX_UNIQUE_TOKENS`, in whole chunks, doubled until `num_unique` fit.
    """
    capacity = -(-min(vocab_size, MAX_UNIQUE_TOKENS) // PROJECTION_CHUNK) * PROJECTION_CHUNK
    while capacity < num_unique:
        capacity *= 2
    return capacity


def plan_units(
    rules: ShardingRules, config: DecoderConfig, requests: Sequence[TokenizedRequest], batch_tokens: int | None
) -> list[WorkUnit]:
    """Divide requests into work units, longest rows first.

    Args:
      rules: sharding rules of the model; only the number of replicas matters.
      config: of the model; no input is longer than its positions.
      requests: distinct and sorted, as `engine.deduplicate` returns them.
      batch_tokens: token positions in one device batch; None: the default.
    """
    if not requests:
        return []
    units: list[WorkUnit] = []
    batches: list[BatchSpec] = []
    devices = range(rules.data_parallelism)
    unique: tuple[np.ndarray, ...] = (np.zeros(0, np.int32),) * len(devices)
    filled, positions = np.zeros(len(devices), np.int64), 0
    num_slots = buffer_size(rules, config.max_positions, batch_tokens)
    for batch in _make_batches(rules, config, requests, batch_tokens):
        size = batch.rows_per_device
        shards = [batch.rows[device * size : (device + 1) * size] for device in devices]
        queries = np.array([sum(len(row.query_positions) for row in rows) for rows in shards])
        new = tuple(np.unique(np.concatenate([unique[0][:0], *(row.tokens for row in rows)])) for rows in shards)
        union = tuple(map(np.union1d, unique, new))
        added = batch.length * size
        max_batches = SMALL_BATCHES if positions + added <= UNIT_TOKENS else UNIT_BATCHES
        is_full = len(batches) >= max_batches or (filled + queries > num_slots).any()
        if batches and (is_full or max(map(len, union)) > MAX_UNIQUE_TOKENS):
            units.append(WorkUnit(len(units), tuple(batches), unique))
            batches, union, filled, positions = [], new, np.zeros_like(filled), 0
        batches.append(batch)
        unique, filled, positions = union, filled + queries, positions + added
    return [*units, WorkUnit(len(units), tuple(batches), unique)]


def _make_batches(
    rules: ShardingRules, config: DecoderConfig, requests: Sequence[TokenizedRequest], batch_tokens: int | None
) -> Iterator[BatchSpec]:
    """Yield the batches, longest rows first."""
    tokens = batch_tokens or default_batch_tokens(rules)
    rows, lengths = choose_packing(requests, config, tokens)
    counts = np.array([len(row.query_positions) for row in rows], np.int64)
    num_queries = np.empty_like(counts)
    for length in np.unique(lengths).tolist():
        # All of the last layer but its keys and values, a sixth of it, is computed at query positions only.
        members = lengths == length
        num_queries[members] = choose_bucket_lengths(
            counts[members], length, lambda n: n * (5 / 6 / config.num_layers), COMPILE_COST * tokens
        )
    order = sorted(range(len(rows)), key=lambda i: (-lengths[i], -num_queries[i], -rows[i].size))
    start = 0
    while start < len(order):
        length = int(lengths[order[start]])
        num_rows = batch_rows(rules, length, tokens)
        members = order[start : start + num_rows]
        start += num_rows
        per_device, most = num_rows // rules.data_parallelism, int(num_queries[members].max())
        yield BatchSpec(length, per_device, most, tuple(rows[i] for i in members))
