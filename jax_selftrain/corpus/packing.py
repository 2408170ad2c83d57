"""Packing of documents into training rows: tokens, segments, positions, weights.

Masks, position resets and loss weights are thus data. Document d is `start_id + tokens`; position t of a row predicts
tokens[:, t+1] with weights[:, t]. Every corpus token is predicted once:

- `masked`: documents share rows, but not attention (segments) or positions. A document is split only if it exceeds a
  row, because its continuation without its beginning is not what the model would sample. Each piece is a segment that
  starts with the last token of the previous piece. Best-fit decreasing (Ding et al. 2024, arXiv:2404.10830).
- `single`: one document (or piece) a row.
- `packed`: all documents as a single one, so that attention crosses documents, as in Pythia's training. Start ids
  separate them, except after the same id; predicting a start id has weight 0.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain.config import Packing
from jax_selftrain.corpus.reader import Corpus
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic, json_files
from jax_selftrain.io.manifest import folder_manifest, verify_checksums

_ARRAYS = {"tokens": np.int32, "segments": np.int32, "positions": np.int32, "weights": np.float32}
_BLOCK_TOKENS = 1 << 20  # tokens of a block of rows: bounded memory, vectorized work

MakeRows = Callable[[int, int], dict[str, np.ndarray]]
"""Function (a, b) that makes rows a … b−1 of every array."""


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
    statistics: Mapping[str, Any]
    """packing, seq_len, rows, documents, long_documents (longer than seq_len), tokens (predicted, each once),
    padding_share (of the positions)."""

    def __len__(self) -> int:
        return len(self.tokens)


def build_packed_rows(corpus: Corpus, folder: atomic.PathLike, seq_len: int, packing: Packing) -> PackedRows:
    """Pack a corpus into memory-mapped arrays in a folder, unless they exist.

    Packing holds the tokens of the corpus (a few bytes each) and a block of rows in memory. A folder that is damaged,
    or of another corpus, length or packing, is replaced.

    Args:
        corpus: the corpus.
        folder: the folder of the arrays.
        seq_len: T, loss positions in a row.
        packing: `masked`, `packed` or `single`, see the module's docstring.

    Raises:
        InputError: seq_len is below 1, the packing is unknown, the corpus has no token, or the folder cannot be
            written.
    """
    folder = Path(folder)
    atomic.remove_stale_temp_files(folder.parent)
    wanted = {
        "format": "jax-selftrain rows",
        "version": 1,
        "corpus": corpus.fingerprint,
        "seq_len": seq_len,
        "packing": packing,
    }
    if not _is_current(folder, wanted):
        statistics, make_rows = _plan_rows(corpus, seq_len, packing)
        with atomic.commit_folder(folder, overwrite=True) as temp:
            _write_arrays(make_rows, temp, statistics["rows"], seq_len)
            facts = {**wanted, "statistics": statistics, "files": folder_manifest(temp)}
            json_files.write_json(temp / "rows.json", facts)
    maps = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
    return PackedRows(**maps, statistics=json_files.read_json(folder / "rows.json")["statistics"])


def _is_current(folder: Path, wanted: Mapping[str, Any]) -> bool:
    """Return True if the rows are undamaged and up to date."""
    try:
        found = json_files.read_json(folder / "rows.json")
        if not isinstance(found, dict) or any(found.get(key) != value for key, value in wanted.items()):
            return False
        verify_checksums(folder, {f"{name}.npy": found["files"][f"{name}.npy"] for name in _ARRAYS})
    except (InputError, KeyError):
        return False  # rows are a cache, so damaged rows are rebuilt
    return True


def _plan_rows(corpus: Corpus, seq_len: int, packing: Packing) -> tuple[dict[str, Any], MakeRows]:
    """Assign pieces of documents to rows; return statistics and their maker.

    A piece of n targets takes n + 1 of the T + 1 slots of a row.
    """
    if seq_len < 1:
        raise InputError(f"seq_len {seq_len}: a row needs at least one loss position")
    if packing not in ("masked", "packed", "single"):
        raise InputError(f"packing {packing!r}: choose masked, packed or single")
    tokens, offsets, _ = corpus.token_arrays()
    kept = np.diff(offsets) > 0  # an empty document has no targets
    starts, lengths = offsets[:-1][kept], np.diff(offsets)[kept]
    if not len(lengths):
        raise InputError(f"{corpus.folder}: no document has a token, so there is nothing to train on")
    statistics: dict[str, Any] = {
        "packing": packing,
        "seq_len": seq_len,
        "documents": len(lengths),
        "long_documents": int(np.count_nonzero(lengths > seq_len)),
        "tokens": int(lengths.sum()),
    }
    is_target = np.ones(len(tokens), bool)
    if packing == "packed":
        separated = starts[1:][tokens[starts[1:] - 1] != corpus.start_id]
        tokens, is_target = np.insert(tokens, separated, corpus.start_id), np.insert(is_target, separated, False)
        starts, lengths = np.zeros(1, np.int64), np.array([len(tokens)])

    counts = -(-lengths // seq_len)
    owner, nth = np.repeat(np.arange(len(counts)), counts), _ragged_arange(counts)
    slots = np.minimum(seq_len, lengths[owner] - nth * seq_len) + 1
    row = _best_fit(slots, seq_len + 1) if packing == "masked" else np.arange(len(slots))
    order = np.argsort(row, kind="stable")  # by row, then in document order
    # Index of the token in a piece's first slot; for the first piece of a document, that of the implied start id.
    before = (starts[owner] + nth * seq_len - 1)[order]
    row, slots, is_first = row[order], slots[order], (nth == 0)[order]
    n_rows, inputs = int(row[-1]) + 1, int(np.minimum(np.bincount(row, slots), seq_len).sum())
    statistics |= {"rows": n_rows, "padding_share": 1 - inputs / (n_rows * seq_len)}

    def make_rows(first: int, last: int) -> dict[str, np.ndarray]:
        chosen = slice(*np.searchsorted(row, [first, last]))
        owner_row, sizes = row[chosen] - first, slots[chosen]
        rank = _ragged_arange(np.bincount(owner_row))  # index of a piece in its row
        piece, within = np.repeat(np.arange(len(sizes)), sizes), _ragged_arange(sizes)
        # The pieces of a row follow each other.
        column = _ragged_arange(np.bincount(owner_row, sizes).astype(np.int64))
        slot = owner_row[piece] * (seq_len + 1) + column
        source = before[chosen][piece] + within
        is_start = is_first[chosen][piece] & (within == 0)
        has_target = within < sizes[piece] - 1
        has_target[has_target] = is_target[source[has_target] + 1]
        values = {
            "tokens": np.where(is_start, corpus.start_id, tokens[np.maximum(source, 0)]),
            "segments": rank[piece] + 1,
            "positions": within,
            "weights": has_target,
        }
        block = {}
        for name, value in values.items():
            rows = np.zeros((last - first) * (seq_len + 1), _ARRAYS[name])
            rows[slot] = value
            block[name] = rows.reshape(last - first, seq_len + 1)[:, : None if name == "tokens" else seq_len]
        return block

    return statistics, make_rows


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


def _write_arrays(make_rows: MakeRows, folder: Path, n_rows: int, seq_len: int) -> None:
    # Written, not memory-mapped: on a full disk a mapped page kills the process, a write raises an error.
    step = max(1, _BLOCK_TOKENS // seq_len)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.npy", "wb")) for name in _ARRAYS}
        for name, dtype in _ARRAYS.items():
            descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
            header = {"descr": descr, "fortran_order": False, "shape": (n_rows, seq_len + (name == "tokens"))}
            np.lib.format.write_array_header_1_0(files[name], header)
        for first in range(0, n_rows, step):
            for name, values in make_rows(first, min(first + step, n_rows)).items():
                files[name].write(np.ascontiguousarray(values).data)


def _ragged_arange(counts: np.ndarray) -> np.ndarray:
    """Concatenate 0 … counts[i]−1 for all i."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
