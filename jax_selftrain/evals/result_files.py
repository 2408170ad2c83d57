"""Reading JSONL, and writing a result: one JSON file and its companions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jax_selftrain.config import yaml_io
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic


def read_jsonl(path: Path, limit: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file, one a line, each with its place (`file.jsonl:12`); empty lines are skipped.

    Raises:
      InputError: the file is missing, not UTF-8, or a line is not a JSON object.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            found = 0
            for number, line in enumerate(lines, 1):
                if limit is not None and found == limit:
                    return
                if line.strip():
                    found += 1
                    yield f"{path}:{number}", _json_object(line, f"{path}:{number}")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (IsADirectoryError, UnicodeDecodeError, PermissionError) as error:
        raise InputError(f"{path}: cannot be read as JSONL ({error})") from None


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg}); the file must hold one JSON object per line") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: {type(row).__name__} instead of a JSON object")
    return row


def is_text(value: Any) -> bool:
    """Whether a JSON value is a string that can be written in UTF-8 (half a surrogate pair cannot)."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def output_paths(out: str, *parts: str) -> tuple[Path, ...]:
    """`FILE.json` and, beside it, `FILE.PART` for each of the given parts of a result.

    Raises:
      InputError: `out` is a folder.
    """
    path = Path(out)
    if path.is_dir():
        raise InputError(f"--out {out}: is a folder; give the name of the JSON file to write")
    stem = path.name.removesuffix(".json")
    return path, *(path.with_name(f"{stem}.{part}") for part in parts)


def write_results(
    out: str, config: Any, result: Mapping[str, Any], table: pa.Table, table_name: str, timings: Mapping[str, Any]
) -> None:
    """Commit a result: `FILE.<table_name>.parquet`, resolved config, timings, and the JSON last.

    The JSON holds nothing about the machine or the clock, so that equal work gives equal bytes.
    """
    path, table_file, config_file, timings_file = output_paths(
        out, f"{table_name}.parquet", "config.yaml", "timings.json"
    )
    with atomic.commit_file(table_file) as aside:
        pq.write_table(table, aside, compression="zstd")
    yaml_io.save(config_file, config)
    atomic.write_json(timings_file, timings)
    atomic.write_json(path, result)
