"""JSON Lines: one JSON object a line."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jax_selftrain.errors import InputError


def read_jsonl(path: Path, limit: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`FILE:LINE`, object) for each line; blank lines are skipped.

    Args:
      path: the file, in UTF-8, with or without a byte order mark.
      limit: the number of objects to read; the lines after them are not checked.

    Raises:
      InputError: the file cannot be read, or a line is not a JSON object.
    """
    try:
        with open(path, "rb") as lines:
            count = 0
            for number, line in enumerate(lines, start=1):
                if count == limit:
                    return
                if line.strip(b"\xef\xbb\xbf \t\r\n" if number == 1 else None):
                    count += 1
                    yield f"{path}:{number}", _parse(line, f"{path}:{number}")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line; NaN is a ValueError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise InputError(f"{where}: not a line of JSON ({error}); fix or remove it") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: {type(row).__name__} instead of a JSON object; fix or remove the line")
    return row
