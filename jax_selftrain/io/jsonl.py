"""JSON Lines: one JSON object a line."""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jax_selftrain.errors import InputError

_CRC = "crc32"

_FORMATS = {
    b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a ZIP archive (.npz, .pt, .zip)",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\xfd7zXZ": "compressed with xz",
    b"BZh": "compressed with bzip2",
    b"\x93NUMPY": "a NumPy array",
}
"""First bytes of formats that are taken for JSON Lines by mistake."""


MAX_TEXT = 2**24
"""Largest text in characters; a tokenizer takes about a hundred bytes of memory for each."""


def read_jsonl(path: Path, limit: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`FILE:LINE`, object) for each line; blank lines are skipped.

    Args:
      path: the file, in UTF-8, with or without a byte order mark; gzip is decompressed.
      limit: the number of objects to read; the lines after them are not checked.

    Raises:
      InputError: the file cannot be read, or a line is not a JSON object.
    """
    try:
        with _open_lines(path) as lines:
            count = 0
            for number, line in enumerate(lines, start=1):
                if count == limit:
                    return
                if line.strip(b"\xef\xbb\xbf \t\r\n" if number == 1 else None):
                    count += 1
                    yield f"{path}:{number}", _parse(line, f"{path}:{number}")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def check_text(value: Any, where: str) -> str:
    """Return a text, decoded from UTF-8 if it is bytes.

    Raises:
      InputError: it is no text, longer than `MAX_TEXT`, or no valid UTF-8 (half a surrogate pair, for instance).
    """
    if not isinstance(value, str | bytes):
        raise InputError(f"{where}: the text field holds {type(value).__name__}, not text; fix or remove it")
    if len(value) > MAX_TEXT:
        raise InputError(f"{where}: the text has {len(value):,} characters, more than {MAX_TEXT:,}; split it")
    try:
        return value.decode() if isinstance(value, bytes) else value.encode().decode()
    except UnicodeError as error:
        raise InputError(f"{where}: the text is not valid UTF-8 ({error}); fix or remove it") from None


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line; NaN is a ValueError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def log_entry(row: Mapping[str, Any]) -> str:
    """Return a line with its CRC-32; NaN is a ValueError."""
    return json.dumps({**row, _CRC: _crc32(row)}, ensure_ascii=False, allow_nan=False) + "\n"


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read a log of lines from `log_entry`; none without a file.

    The last line is dropped if it was not written to its end.

    Raises:
      InputError: a line was changed; names it.
    """
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    rows = []
    for number, line in enumerate(whole.split(b"\n") if whole else (), start=1):
        row = _parse(line, f"{path}:{number}")
        if row.pop(_CRC, None) not in (None, _crc32(row)):
            raise InputError(f"{path}:{number}: the line is damaged: it does not match its {_CRC}")
        rows.append(row)
    return rows


def _crc32(row: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())


def _open_lines(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """Open a file; decompress gzip; refuse other formats by name."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path}: is no regular file (a pipe or a device), and is read more than once; write a file")
    with open(path, "rb") as file:
        start = file.read(6)
    for magic, name in _FORMATS.items():
        if start.startswith(magic):
            raise InputError(f"{path}: is {name}, not JSON Lines; decompress or convert it first")
    return gzip.open(path) if start.startswith(b"\x1f\x8b") else open(path, "rb")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise InputError(f"{where}: not a line of JSON ({error}); fix or remove it") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: {type(row).__name__} instead of a JSON object; fix or remove the line")
    return row
