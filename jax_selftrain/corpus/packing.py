"""From documents to training rows (tokens, segments, positions, weights), so that masks, position resets and loss
weights are data, not code.

Document d is `start_id + tokens`; position t of a row predicts tokens[:, t+1] and counts with weights[:, t]. Every
token of the corpus is predicted exactly once, in each packing:

- `masked`: documents share rows but not attention (segments) nor positions. A document stays whole whenever it fits,
  because a text cut off from its beginning is not what the model would have sampled there: predicting it has a
  gradient where self-training at T = 1 should have none. Longer ones are cut into pieces, each a segment of its own
  that begins with the last token of the piece before. Rows are filled best-fit decreasing (Johnson 1973; for language
  models Ding et al. 2024, arXiv:2404.10830).
- `packed`: one stream, cut every `seq_len` tokens; attention crosses documents, as Pythia was trained. The start id
  between two documents is not doubled when the first one ended with the same id, and predicting it carries no weight.
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

_FORMAT = "jax-selftrain rows"
_VERSION = 1
_ARRAYS = {"tokens": np.int32, "segments": np.int32, "positions": np.int32, "weights": np.float32}
_BLOCK_TOKENS = 1 << 20  # rows are filled in blocks of about so many tokens: bounded memory, vectorized work


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Fixed-length training rows; N rows of T loss positions."""

    tokens: np.ndarray
    """int32 [N, T+1]: inputs are [:, :-1], targets [:, 1:]; 0 where there is padding."""
    segments: np.ndarray
    """int32 [N, T]: which document of the row (1, 2, …) the input belongs to; 0 is padding."""
    positions: np.ndarray
    """int32 [N, T]: position of the input in its segment; 0 where there is padding."""
    weights: np.ndarray
    """float32 [N, T]: weight of predicting tokens[:, t+1] from t."""
    statistics: Mapping[str, Any] = field(default_factory=dict)
    """packing, seq_len, rows, documents, long_documents (longer than seq_len), tokens (predicted, each once),
    padding_share (of the positions)."""

    def __len__(self) -> int:
        return len(self.tokens)


def pack_corpus(corpus: Corpus, seq_len: int, packing: Packing) -> PackedRows:
    """Rows of a corpus in memory (16 bytes a position).

    Args:
        corpus: a checked corpus.
        seq_len: T, loss positions in a row.
        packing: `masked`, `packed` or `single`, see the module's docstring.

    Raises:
        InputError: seq_len below 1, an unknown packing, or a corpus without any token.
    """
    layout = _plan_packing(corpus, seq_len, packing)
    arrays = {name: np.empty(layout.shape(name), dtype) for name, dtype in _ARRAYS.items()}
    for first, block in _blocks(layout):
        for name, values in block.items():
            arrays[name][first : first + len(values)] = values
    return PackedRows(**arrays, statistics=layout.statistics)


def build_packed_rows(corpus: Corpus, folder: atomic.PathLike, seq_len: int, packing: Packing) -> PackedRows:
    """Rows of a corpus as memory-mapped arrays in `folder`, made there unless they are there already.

    While they are being made, memory holds the corpus' tokens (4 bytes each) and a block of rows. The folder is
    committed whole; one that is damaged, or belongs to another corpus, length or packing, is made again.

    Raises:
        InputError: as `pack`; or the folder cannot be written.
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
        layout = _plan_packing(corpus, seq_len, packing)
        with atomic.commit_folder(folder, overwrite=True) as aside:
            _write_arrays(layout, aside)
            facts = {**wanted, "statistics": layout.statistics, "files": folder_manifest(aside)}
            atomic.write_json(aside / "rows.json", facts)
    maps = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
    return PackedRows(**maps, statistics=atomic.read_json(folder / "rows.json")["statistics"])


def batch_indices(n_rows: int, batch_size: int, seed: int, n: int) -> np.ndarray:
    """Which rows are batch `n`: a pure function, so that resuming a run takes one integer.

    Batches are cut from the endless sequence of epochs, each a permutation of all rows; so each epoch visits every
    row exactly once, and a batch may span two epochs.

    Returns:
        int64 [batch_size].
    """
    if n_rows < 1 or batch_size < 1 or n < 0:
        raise ValueError(f"batch {n} of {batch_size} rows out of {n_rows} does not exist")
    return epoch_permutation(n_rows, seed, np.arange(n * batch_size, (n + 1) * batch_size))


def epoch_permutation(n_rows: int, seed: int, epoch_positions: np.ndarray, *, corpus: int = 0) -> np.ndarray:
    """Which rows the given visits go to, in the endless sequence of epochs, each a permutation of all rows.

    Args:
        n_rows: rows of the corpus.
        seed: of the run.
        visits: int64 [N], numbers (from 0) of visits to this corpus.
        corpus: which of a run's corpora this is; each has orders of its own.

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
    """`_epoch_order` of a corpus, remembering the latest two: a batch may span two epochs of each corpus."""
    return lru_cache(maxsize=2)(partial(_epoch_order, corpus))


def _epoch_order(corpus: int, n_rows: int, seed: int, epoch: int) -> np.ndarray:
    # Sorting raw Philox words, because numpy guarantees the bit stream for good but not what
    # `Generator.permutation` makes of it (NEP 19).
    words = np.random.Philox(key=np.array([seed % 2**64, (corpus << 32) + epoch], np.uint64)).random_raw(n_rows)
    return np.argsort(words, kind="stable")


# ---------------------------------------------------------------- layouts


@dataclass(frozen=True, eq=False)
class _PackingPlan:
    """Where everything goes, before any row is made."""

    make: Callable[[int, int], dict[str, np.ndarray]]
    """make(a, b) gives rows a … b−1 of every array."""
    statistics: dict[str, Any]

    def shape(self, name: str) -> tuple[int, int]:
        return self.statistics["rows"], self.statistics["seq_len"] + (name == "tokens")


@dataclass(frozen=True, eq=False)
class _Documents:
    """Documents d = flat[begins[d]] … of lengths[d] ≥ 1 tokens, the start id before each of them implied."""

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
    kept = lengths > 0  # a document without tokens has nothing to predict
    begins, lengths = offsets[:-1][kept], lengths[kept]
    if not len(lengths):
        raise InputError(f"{corpus.folder}: none of its documents has a token, so there is nothing to train on")
    documents = _Documents(flat, begins, lengths, corpus.start_id)
    if packing == "packed":
        return _concatenated(documents, seq_len)
    return _chunked(documents, seq_len, packing)


def _blocks(layout: _PackingPlan) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(first row, block of rows), all rows in order."""
    n_rows, seq_len = layout.shape("segments")
    step = max(1, _BLOCK_TOKENS // seq_len)
    for first in range(0, n_rows, step):
        yield first, layout.make(first, min(first + step, n_rows))


def _write_arrays(layout: _PackingPlan, folder: Path) -> None:
    # Written, not memory-mapped: on a full disk a mapped page kills the process where a write says what is wrong.
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.npy", "wb")) for name in _ARRAYS}
        for name, dtype in _ARRAYS.items():
            descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
            header = {"descr": descr, "fortran_order": False, "shape": layout.shape(name)}
            np.lib.format.write_array_header_1_0(files[name], header)
        for _, block in _blocks(layout):
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


def _chunked(documents: _Documents, seq_len: int, packing: Packing) -> _PackingPlan:
    """Rows of whole pieces. A piece of n targets takes n+1 slots of a row's T+1: its first input and its n tokens."""
    pieces = -(-documents.lengths // seq_len)
    owner = np.repeat(np.arange(len(pieces)), pieces)
    nth = _ragged_arange(pieces)
    n_targets = np.minimum(seq_len, documents.lengths[owner] - nth * seq_len)
    # Index in `flat` of the token before the first target; for a document's first piece that is the start id's place.
    before = documents.starts[owner] + nth * seq_len - 1
    slots = n_targets + 1
    row = _best_fit(slots, seq_len + 1) if packing == "masked" else np.arange(len(slots))
    order = np.argsort(row, kind="stable")  # row by row, within a row in document order
    row, before, slots, is_first = row[order], before[order], slots[order], (nth == 0)[order]
    rank = _ragged_arange(np.bincount(row))
    ends = np.cumsum(slots)
    in_row = ends - slots - (ends - slots)[np.searchsorted(row, row)]  # slots of the pieces before it in its row

    def make(a: int, b: int) -> dict[str, np.ndarray]:
        chosen = slice(*np.searchsorted(row, [a, b]))
        sizes = slots[chosen]
        piece = np.repeat(np.arange(len(sizes)), sizes)
        within = _ragged_arange(sizes)
        place = ((row[chosen] - a) * (seq_len + 1) + in_row[chosen])[piece] + within
        source = before[chosen][piece] + within
        implied = is_first[chosen][piece] & (within == 0)
        values = {
            "tokens": np.where(implied, documents.start_id, documents.flat[np.maximum(source, 0)]),
            "segments": rank[chosen][piece] + 1,
            "positions": within,
            "weights": within < sizes[piece] - 1,  # the last token of a piece has nothing to predict
        }
        block = {}
        for name, value in values.items():
            flat_rows = np.zeros((b - a) * (seq_len + 1), _ARRAYS[name])
            flat_rows[place] = value
            block[name] = flat_rows.reshape(b - a, seq_len + 1)[:, : None if name == "tokens" else seq_len]
        return block

    inputs = int((np.minimum(in_row + slots, seq_len) - in_row).sum())
    return _PackingPlan(make, _statistics(documents, seq_len, packing, int(row[-1]) + 1, inputs))


def _best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing: each piece, longest first, goes to the fullest row that still has room for it.

    Open rows wait in one stack per number of free slots; a big integer has a bit for each stack that is not empty, so
    that the fullest fitting one is the lowest bit above `size`. Rows are numbered by their earliest piece.
    """
    stacks: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = 0
    n_rows = 0
    row_of = np.empty(len(sizes), np.int64)
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
        row_of[piece] = row
        if free > size:
            stacks[free - size].append(row)
            occupied |= 1 << (free - size)
    _, earliest, row_of = np.unique(row_of, return_index=True, return_inverse=True)
    number = np.empty(n_rows, np.int64)
    number[np.argsort(earliest)] = np.arange(n_rows)
    return number[row_of]


def _concatenated(documents: _Documents, seq_len: int) -> _PackingPlan:
    """One stream of start ids and documents, cut every T tokens; neighboring rows share the token at the cut."""
    last = documents.flat[documents.starts + documents.lengths - 1]
    separated = np.concatenate([[True], last[:-1] != documents.start_id])
    ends = np.cumsum(documents.lengths + separated)
    heads = ends - documents.lengths  # places of the documents' first tokens in the stream
    total = int(ends[-1])

    def make(a: int, b: int) -> dict[str, np.ndarray]:
        places = np.arange(a * seq_len, min(b * seq_len + 1, total))
        owner = np.searchsorted(ends, places, side="right")
        within = places - heads[owner]  # −1 is the start id before the document
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
    """0 … counts[0]−1, 0 … counts[1]−1, and so on."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def _is_current(folder: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether the rows in `folder` are undamaged and those that are wanted."""
    try:
        found = atomic.read_json(folder / "rows.json")
        if not isinstance(found, dict) or any(found.get(key) != value for key, value in wanted.items()):
            return False
        verify_checksums(folder, {f"{name}.npy": found["files"][f"{name}.npy"] for name in _ARRAYS})
    except (InputError, KeyError):
        return False  # rows are a cache: whatever is wrong with them, they are made again
    return True
