"""Packing of documents into training rows: tokens, segments, positions, weights.

Masks, position resets and loss weights are thus data. Document d is `start_id + tokens`; position t of a row predicts
tokens[:, t+1] with weights[:, t]. Every corpus token is predicted once:

- `masked`: documents share rows, but not attention (segments) or positions. A document is split only if it exceeds a
  row, because its continuation without its beginning is not what the model would sample. Each piece is a segment that
  starts with the last token of the previous piece. Best-fit decreasing (Ding et al. 2024, arXiv:2404.10830).
- `packed`: one stream, cut every `seq_len` tokens; attention crosses documents, as in Pythia's training. A start id
  after the same id is omitted; predicting a start id has weight 0.
- `single`: one document (or piece) a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain.config import Packing
from jax_selftrain.corpus.reader import Corpus
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.io.manifest import folder_manifest, verify_checksums
from jax_selftrain.io.rng import random_permutation

_FORMAT = "jax-selftrain rows"
_VERSION = 1
_ARRAYS = {"tokens": np.int32, "segments": np.int32, "positions": np.int32, "weights": np.float32}
_BLOCK_TOKENS = 1 << 20  # tokens of a block of rows: bounded memory, vectorized work


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Fixed-length training rows; N rows of T loss positions."""

    tokens: np.ndarray
    """int32 [N, T+1]: inputs are [:, :-1], targets [:, 1:]; padding is 0."""
    segments: np.ndarray
    """int32 [N, T]: document of the input in the row (1, 2, …); padding is 0."""
    positions: np.ndarray
    """int32 [N, T]: position of the input in its segment; padding is 0."""
    weights: np.ndarray
    """float32 [N, T]: weight of predicting tokens[:, t+1] from t."""
    statistics: Mapping[str, Any] = field(default_factory=dict)
    """packing, seq_len, rows, documents, long_documents (longer than seq_len), tokens (predicted, each once),
    padding_share (of the positions)."""

    def __len__(self) -> int:
        return len(self.tokens)


def pack_corpus(corpus: Corpus, seq_len: int, packing: Packing) -> PackedRows:
    """Pack a corpus into rows in memory (16 bytes a position).

    Args:
        corpus: the corpus.
        seq_len: T, loss positions in a row.
        packing: `masked`, `packed` or `single`, see the module's docstring.

    Raises:
        InputError: seq_len is below 1, the packing is unknown, or the corpus has no token.
    """
    plan = _plan_packing(corpus, seq_len, packing)
    arrays = {name: np.empty(plan.shape(name), dtype) for name, dtype in _ARRAYS.items()}
    for first, block in _blocks(plan):
        for name, values in block.items():
            arrays[name][first : first + len(values)] = values
    return PackedRows(**arrays, statistics=plan.statistics)


def build_packed_rows(corpus: Corpus, folder: atomic.PathLike, seq_len: int, packing: Packing) -> PackedRows:
    """Pack a corpus into memory-mapped arrays in a folder, unless they exist.

    Packing holds the tokens of the corpus (4 bytes each) and a block of rows in memory. A folder that is damaged, or of
    another corpus, length or packing, is replaced.

    Raises:
        InputError: see `pack_corpus`; or the folder cannot be written.
    """
    folder = Path(folder)
    atomic.remove_stale_temp_files(folder.parent)
    wanted = {
        "format": _FORMAT,
        "version": _VERSION,
        "corpus": corpus.fingerprint,
        "seq_len": seq_len,
        "packing": packing,
    }
    if not _is_current(folder, wanted):
        plan = _plan_packing(corpus, seq_len, packing)
        with atomic.commit_folder(folder, overwrite=True) as temp:
            _write_arrays(plan, temp)
            facts = {**wanted, "statistics": plan.statistics, "files": folder_manifest(temp)}
            atomic.write_json(temp / "rows.json", facts)
    maps = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
    return PackedRows(**maps, statistics=atomic.read_json(folder / "rows.json")["statistics"])


def batch_indices(n_rows: int, batch_size: int, seed: int, n: int) -> np.ndarray:
    """Return the rows of batch `n`, int64 [batch_size].

    Epochs are permutations of all rows; batches are consecutive pieces of the endless sequence of epochs.
    """
    if n_rows < 1 or batch_size < 1 or n < 0:
        raise ValueError(f"batch {n} of {batch_size} rows out of {n_rows} does not exist")
    return epoch_permutation(n_rows, seed, np.arange(n * batch_size, (n + 1) * batch_size))


def epoch_permutation(n_rows: int, seed: int, epoch_positions: np.ndarray, *, corpus: int = 0) -> np.ndarray:
    """Return the rows at positions of the endless sequence of epochs.

    Args:
        n_rows: number of rows of the corpus.
        seed: seed of the run.
        epoch_positions: int64 [N], positions in the sequence.
        corpus: index of the corpus in the mixture; each has its own permutations.

    Returns:
        int64 [N].
    """
    epochs, within = np.divmod(epoch_positions, n_rows)
    rows = np.empty(len(epoch_positions), np.int64)
    for epoch in np.unique(epochs).tolist():
        chosen = epochs == epoch
        rows[chosen] = _orders(corpus)(n_rows, seed, epoch)[within[chosen]]
    return rows


@cache
def _orders(corpus: int) -> Callable[[int, int, int], np.ndarray]:
    """Cache the last two orders; a batch may span two epochs."""
    return lru_cache(maxsize=2)(partial(_epoch_order, corpus))


def _epoch_order(corpus: int, n_rows: int, seed: int, epoch: int) -> np.ndarray:
    # This key, not that of `make_rng`, so that stored runs resume with the same batches.
    bits = np.random.Philox(key=np.array([seed % 2**64, (corpus << 32) + epoch], np.uint64))
    return random_permutation(np.random.Generator(bits), n_rows)


@dataclass(frozen=True, eq=False)
class _PackingPlan:
    """Assignment of tokens to rows, and a function that builds rows."""

    make: Callable[[int, int], dict[str, np.ndarray]]
    """make(a, b) returns rows a … b−1 of every array."""
    statistics: dict[str, Any]

    def shape(self, name: str) -> tuple[int, int]:
        return self.statistics["rows"], self.statistics["seq_len"] + (name == "tokens")


@dataclass(frozen=True, eq=False)
class _Documents:
    """Documents flat[starts[d]:starts[d] + lengths[d]], lengths ≥ 1, start ids implied."""

    flat: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    start_id: int


def _plan_packing(corpus: Corpus, seq_len: int, packing: Packing) -> _PackingPlan:
    if seq_len < 1:
        raise InputError(f"seq_len {seq_len}: a row needs at least one loss position")
    if packing not in ("masked", "packed", "single"):
        raise InputError(f"packing {packing!r}: choose masked, packed or single")
    flat, offsets, _ = corpus.token_arrays()
    lengths = np.diff(offsets)
    kept = lengths > 0  # an empty document has no targets
    begins, lengths = offsets[:-1][kept], lengths[kept]
    if not len(lengths):
        raise InputError(f"{corpus.folder}: no document has a token, so there is nothing to train on")
    documents = _Documents(flat, begins, lengths, corpus.start_id)
    if packing == "packed":
        return _plan_stream(documents, seq_len)
    return _plan_pieces(documents, seq_len, packing)


def _blocks(plan: _PackingPlan) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yield (first row, block of rows) in order."""
    n_rows, seq_len = plan.shape("segments")
    step = max(1, _BLOCK_TOKENS // seq_len)
    for first in range(0, n_rows, step):
        yield first, plan.make(first, min(first + step, n_rows))


def _write_arrays(plan: _PackingPlan, folder: Path) -> None:
    # Written, not memory-mapped: on a full disk a mapped page kills the process, a write raises an error.
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.npy", "wb")) for name in _ARRAYS}
        for name, dtype in _ARRAYS.items():
            descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
            header = {"descr": descr, "fortran_order": False, "shape": plan.shape(name)}
            np.lib.format.write_array_header_1_0(files[name], header)
        for _, block in _blocks(plan):
            for name, values in block.items():
                files[name].write(np.ascontiguousarray(values).data)


def _statistics(documents: _Documents, seq_len: int, packing: Packing, n_rows: int, inputs: int) -> dict[str, Any]:
    return {
        "packing": packing,
        "seq_len": seq_len,
        "rows": n_rows,
        "documents": len(documents.lengths),
        "long_documents": int(np.count_nonzero(documents.lengths > seq_len)),
        "tokens": int(documents.lengths.sum()),
        "padding_share": 1 - inputs / (n_rows * seq_len),
    }


def _plan_pieces(documents: _Documents, seq_len: int, packing: Packing) -> _PackingPlan:
    """Plan rows of pieces; n targets take n+1 of T+1 slots."""
    pieces = -(-documents.lengths // seq_len)
    owner = np.repeat(np.arange(len(pieces)), pieces)
    nth = _ragged_arange(pieces)
    n_targets = np.minimum(seq_len, documents.lengths[owner] - nth * seq_len)
    # Index in `flat` of the token before the first target; for the first piece it is the slot of the start id.
    before = documents.starts[owner] + nth * seq_len - 1
    slots = n_targets + 1
    row = _best_fit(slots, seq_len + 1) if packing == "masked" else np.arange(len(slots))
    order = np.argsort(row, kind="stable")  # by row, then in document order
    row, before, slots, is_first = row[order], before[order], slots[order], (nth == 0)[order]
    rank = _ragged_arange(np.bincount(row))
    ends = np.cumsum(slots)
    in_row = ends - slots - (ends - slots)[np.searchsorted(row, row)]  # slots of earlier pieces of the row

    def make(a: int, b: int) -> dict[str, np.ndarray]:
        chosen = slice(*np.searchsorted(row, [a, b]))
        sizes = slots[chosen]
        piece = np.repeat(np.arange(len(sizes)), sizes)
        within = _ragged_arange(sizes)
        slot = ((row[chosen] - a) * (seq_len + 1) + in_row[chosen])[piece] + within
        source = before[chosen][piece] + within
        implied = is_first[chosen][piece] & (within == 0)
        values = {
            "tokens": np.where(implied, documents.start_id, documents.flat[np.maximum(source, 0)]),
            "segments": rank[chosen][piece] + 1,
            "positions": within,
            "weights": within < sizes[piece] - 1,  # the last token of a piece has no target
        }
        block = {}
        for name, value in values.items():
            flat_rows = np.zeros((b - a) * (seq_len + 1), _ARRAYS[name])
            flat_rows[slot] = value
            block[name] = flat_rows.reshape(b - a, seq_len + 1)[:, : None if name == "tokens" else seq_len]
        return block

    inputs = int((np.minimum(in_row + slots, seq_len) - in_row).sum())
    return _PackingPlan(make, _statistics(documents, seq_len, packing, int(row[-1]) + 1, inputs))


def _best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Assign pieces to rows by best-fit decreasing.

    Each piece, longest first, goes to the fullest row with enough free slots. Open rows are kept in one stack per
    number of free slots; the bits of an integer mark non-empty stacks. Rows are numbered by their earliest piece.
    """
    stacks: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = 0
    n_rows = 0
    row_index = np.empty(len(sizes), np.int64)
    order = np.argsort(-sizes, kind="stable")
    for piece, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fitting = occupied >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = stacks[free].pop()
            if not stacks[free]:
                occupied ^= 1 << free
        else:
            free, row = capacity, n_rows
            n_rows += 1
        row_index[piece] = row
        if free > size:
            stacks[free - size].append(row)
            occupied |= 1 << (free - size)
    _, earliest, row_index = np.unique(row_index, return_index=True, return_inverse=True)
    number = np.empty(n_rows, np.int64)
    number[np.argsort(earliest)] = np.arange(n_rows)
    return number[row_index]


def _plan_stream(documents: _Documents, seq_len: int) -> _PackingPlan:
    """Plan one stream of start ids and documents, cut every T tokens."""
    last = documents.flat[documents.starts + documents.lengths - 1]
    separated = np.concatenate([[True], last[:-1] != documents.start_id])
    ends = np.cumsum(documents.lengths + separated)
    heads = ends - documents.lengths  # stream positions of the first tokens of documents
    total = int(ends[-1])

    def make(a: int, b: int) -> dict[str, np.ndarray]:
        positions = np.arange(a * seq_len, min(b * seq_len + 1, total))
        owner = np.searchsorted(ends, positions, side="right")
        within = positions - heads[owner]  # −1 is the start id before the document
        source = np.maximum(documents.starts[owner] + within, 0)
        tokens = np.where(within < 0, documents.start_id, documents.flat[source])
        inputs = (b - a) * seq_len
        stream = np.zeros(inputs + 1, np.int32)
        stream[: len(tokens)] = tokens
        weights = np.zeros(inputs, np.float32)
        weights[: len(tokens) - 1] = within[1:] >= 0
        segments = np.zeros(inputs, np.int32)
        segments[: len(tokens)] = 1
        return {
            "tokens": np.lib.stride_tricks.sliding_window_view(stream, seq_len + 1)[::seq_len],
            "segments": segments.reshape(b - a, seq_len),
            "positions": np.tile(np.arange(seq_len, dtype=np.int32), (b - a, 1)) * segments.reshape(b - a, seq_len),
            "weights": weights.reshape(b - a, seq_len),
        }

    n_rows = -(-(total - 1) // seq_len)
    inputs = min(total, n_rows * seq_len)
    return _PackingPlan(make, _statistics(documents, seq_len, "packed", n_rows, inputs))


def _ragged_arange(counts: np.ndarray) -> np.ndarray:
    """Concatenate 0 … counts[i]−1 for all i."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def _is_current(folder: Path, wanted: Mapping[str, Any]) -> bool:
    """Return True if the rows are undamaged and up to date."""
    try:
        found = atomic.read_json(folder / "rows.json")
        if not isinstance(found, dict) or any(found.get(key) != value for key, value in wanted.items()):
            return False
        verify_checksums(folder, {f"{name}.npy": found["files"][f"{name}.npy"] for name in _ARRAYS})
    except (InputError, KeyError):
        return False  # rows are a cache, so damaged rows are rebuilt
    return True
