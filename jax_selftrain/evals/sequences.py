"""Extraction sets: sequences that are known training data, or known not.

A reference is `FILE.npy` (integers [N, T]), `PREFIX.npy:SUFFIX.npy` or the folder of the pair
(lm-extraction-benchmark), `NAME.bin` with `NAME.idx` (Megatron-LM), `FILE.jsonl`, `FILE.parquet`, FOLDER[:SPLIT] of
Parquet files, a `save_to_disk` folder of `datasets`, or a data set of the hub, `org/name[@revision]:SPLIT`. Their
column is `tokens` (pythia-memorized-evals), `input_ids` or `token_ids` (pretokenized Pile), `text`, or another one by
name.
Special strings such as `</s>` in a text are special tokens, so that a prefix can begin with BOS. Optional columns are
`index` (sequence id) and `duplicates` (number of copies in the training data). Pickled object arrays are refused.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from jax_selftrain.errors import InputError
from jax_selftrain.evals.duplicate_counts import read_duplicates
from jax_selftrain.evals.sequence_files import (
    download_sequences,
    flatten_tokens,
    optional_column,
    read_table,
    sequence_files,
)
from jax_selftrain.io.json_files import hash_json
from jax_selftrain.io.manifest import sha256_file


@dataclass(frozen=True, eq=False)
class ExtractionSet:
    """N sequences of one length."""

    tokens: np.ndarray
    """int32 [N, length]."""
    sequence_id: np.ndarray
    """int64 [N]: column `index` of the set, or the row number in its file."""
    duplicates: np.ndarray | None
    """int64 [N]: number of copies in the training data, if known."""
    num_skipped: int = 0
    """Number of sequences that are too short for the window."""


@dataclass(frozen=True)
class PromptWindow:
    """Position of prefix and suffix in each sequence."""

    prefix: int
    suffix: int
    offset: int = 0
    """Number of tokens to skip."""
    random_offset: bool = False
    """Skip a random number of further tokens, up to the maximum; it is drawn by hash from the sequence id."""

    @property
    def length(self) -> int:
        """Length of prefix and suffix."""
        return self.prefix + self.suffix


def load_sequences(
    reference: str | Path,
    window: PromptWindow,
    *,
    vocab_size: int,
    limit: int | None = None,
    subsample: int | None = None,
    tokenizer: Callable[[], Any],
    column: str = "",
    duplicates: str = "",
) -> ExtractionSet:
    """Load the window of each sequence.

    Args:
      reference: see the module.
      window: with an offset, sequences that are too short are skipped, otherwise refused. In a pair of files, the
        prefix ends at the end of the first file, plus the offset.
      vocab_size: upper bound of ids.
      limit: maximum number of sequences to read, from the first.
      subsample: maximum number of sequences to keep: those with the smallest hashes of their ids.
      tokenizer: loads the tokenizer; called only for text.
      column: name of the column of tokens or text.
      duplicates: file with the number of copies of each sequence in the training data (`read_duplicates`).

    Raises:
      InputError: not readable, empty, pickled, not integers, too short, or ids outside the vocabulary.
    """
    where = download_sequences(str(reference))
    table, prefix_width, labels = read_table(where, limit=limit, tokenizer=tokenizer, column=column)
    begin = window.offset
    if prefix_width is not None:
        if window.prefix > prefix_width + begin:
            raise InputError(f"{where}: its prefixes have {prefix_width} tokens, fewer than --prefix {window.prefix}")
        begin += prefix_width - window.prefix
    tokens, lengths = flatten_tokens(where, table)
    index, copies = optional_column(where, table, "index"), optional_column(where, table, "duplicates")
    if duplicates:
        if copies is not None:
            raise InputError(f"--duplicate-counts {duplicates}: {where} has a column `duplicates`; drop one of the two")
        copies = read_duplicates(duplicates, len(lengths), index)
    index = np.arange(len(lengths), dtype=np.int64) if index is None else index
    long_enough = lengths >= begin + window.length
    if not window.offset and not long_enough.all():
        first = int(np.argmin(long_enough))
        label = labels[first] if labels else f"{where}: sequence {first}"
        raise InputError(
            f"{label}: {lengths[first]} tokens, fewer than prefix + suffix = {window.length}; shorten these, or remove "
            "the sequence"
        )
    if not len(lengths):
        raise InputError(f"{where}: no sequences in it")
    members = np.flatnonzero(long_enough)
    if not len(members):
        raise InputError(
            f"{where}: no sequence has {begin + window.length} tokens, as --offset {window.offset} with prefix + "
            f"suffix = {window.length} needs; lower one of them"
        )
    num_skipped = len(lengths) - len(members)
    if subsample is not None and subsample < len(members):
        digests = [hashlib.sha256(f"subsample {i}".encode()).digest() for i in index[members].tolist()]
        members = members[np.sort(np.argsort(np.array(digests, dtype="S32"), kind="stable")[:subsample])]
    starts = (np.cumsum(lengths) - lengths)[members] + begin
    if window.random_offset:
        spare = (lengths[members] - begin - window.length).tolist()
        hashes = [int.from_bytes(hashlib.sha256(f"offset {i}".encode()).digest()[:8]) for i in index[members]]
        starts += np.array([n % (most + 1) for n, most in zip(hashes, spare, strict=True)])
    rows = np.asarray(sliding_window_view(tokens, window.length)[starts])
    outside = np.argwhere((rows < 0) | (rows >= vocab_size))
    if len(outside):
        row, position = outside[0]
        raise InputError(
            f"{where}: token id {rows[row, position]} of sequence {members[row]} is outside the model's vocabulary of "
            f"{vocab_size}; are the sequences of another tokenizer?"
        )
    copies = None if copies is None else copies[members]
    return ExtractionSet(rows.astype(np.int32), index[members], copies, num_skipped)


def sequences_fingerprint(reference: str | Path) -> str:
    """Hash the file or files of an extraction set.

    Raises:
      InputError: a file is missing.
    """
    files = sequence_files(download_sequences(str(reference)))
    if len(files) == 1:
        return sha256_file(files[0])
    return hash_json({path.name: sha256_file(path) for path in files})
