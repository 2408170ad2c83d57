"""Rows of files: JSON Lines, JSON arrays, Parquet, plain text."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jax_selftrain.errors import InputError
from jax_selftrain.io.jsonl import read_jsonl

PLAIN_TEXT = (".txt", ".raw")
SUFFIXES = (".jsonl", ".json", ".parquet", *PLAIN_TEXT)
_BATCH_ROWS = 256


def read_rows(path: Path, limit: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (location, row) for each row of a file.

    `.parquet` has a row for each of its rows; `.txt` and `.raw` (as WikiText is published) are one row with all their
    `text`; `.json` with an array has a row for each object. Everything else is JSON Lines, also with gzip.

    Args:
      path: the file.
      limit: the number of rows to read.

    Raises:
      InputError: the file cannot be read, or a row is not an object.
    """
    if path.suffix == ".parquet":
        yield from islice(_read_parquet_rows(path), limit)
    elif path.suffix in PLAIN_TEXT:
        yield from islice([(str(path), {"text": _read_bytes(path)})], limit)
    elif path.suffix == ".json" and _read_bytes(path).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from islice(_read_array(path), limit)
    else:
        yield from read_jsonl(path, limit)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise InputError(f"{path}: {reason}") from error


def _read_array(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(_read_bytes(path).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); fix it") from None
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(
                f"{path}: entry {number} is {type(row).__name__} instead of a JSON object; fix or remove it"
            )
        yield f"{path}: entry {number}", row


def _read_parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH_ROWS):
                for row in batch.to_pylist():
                    yield f"{path} row {number}", row
                    number += 1
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({' '.join(str(error).split())[:200]})") from None
