"""Reading an extraction set: sequences that are known to be (or not to be) in a model's training data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain.errors import InputError
from jax_selftrain.scoring.files import read_jsonl


def load_sequences(
    path: Path, length: int, *, vocab_size: int, limit: int | None = None, tokenizer: Callable[[], Any]
) -> np.ndarray:
    """The first `length` tokens of each sequence.

    Args:
      path: `.npy` integer array [N, ≥length], or JSONL with `tokens` (list of ids) or `text` (encoded without special
        tokens) per line.
      length: prefix + suffix, in tokens.
      vocab_size: ids must be below it.
      limit: read only the first so many sequences.
      tokenizer: gives the tokenizer; called only where there is text.

    Returns:
      int32 [N, length].

    Raises:
      InputError: not readable, empty, pickled, not integers, too short, or ids outside the vocabulary.
    """
    rows = _read_npy(path, length) if path.suffix == ".npy" else _read_jsonl(path, length, limit, tokenizer)
    rows = np.asarray(rows[:limit, :length])
    if not len(rows):
        raise InputError(f"{path}: no sequences in it")
    outside = np.argwhere((rows < 0) | (rows >= vocab_size))
    if len(outside):
        row, column = outside[0]
        raise InputError(
            f"{path}: token id {rows[row, column]} of sequence {row} is outside the model's vocabulary of "
            f"{vocab_size}; are the sequences of another tokenizer?"
        )
    return rows.astype(np.int32)


def _read_npy(path: Path, length: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{path}: not a plain .npy array ({' '.join(str(error).split())}); write it with numpy.save, without "
            "pickled objects"
        ) from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive of arrays"
        raise InputError(f"{path}: must be an integer array [sequences, tokens], not {found}")
    if array.shape[1] < length:
        raise InputError(
            f"{path}: its sequences have {array.shape[1]} tokens, fewer than prefix + suffix = {length}; shorten these"
        )
    return array


def _read_jsonl(path: Path, length: int, limit: int | None, tokenizer: Callable[[], Any]) -> np.ndarray:
    encoder = None
    rows = []
    for where, row in read_jsonl(path, limit):
        if "tokens" in row:
            tokens = row["tokens"]
            if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
                raise InputError(f"{where}: `tokens` must be a list of whole numbers")
        elif isinstance(row.get("text"), str):
            encoder = encoder or tokenizer()
            tokens = encoder.encode(row["text"], add_special_tokens=False)
        else:
            raise InputError(f"{where}: neither `tokens` nor `text`")
        if len(tokens) < length:
            raise InputError(
                f"{where}: {len(tokens)} tokens, fewer than prefix + suffix = {length}; shorten these, or drop the line"
            )
        if any(abs(token) >= 2**31 for token in tokens[:length]):
            raise InputError(f"{where}: a token id does not fit 32 bits")
        rows.append(tokens[:length])
    return np.array(rows, np.int64).reshape(len(rows), length)
