"""A result on disk: one JSON file and its companions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jax_selftrain.config import yaml_io
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic


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
