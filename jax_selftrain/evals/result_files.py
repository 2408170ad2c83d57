"""Files of a result (`FILE.json`, tables, config, timings) and entries of `FILE.json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jax_selftrain.config import yaml_io
from jax_selftrain.errors import InputError
from jax_selftrain.io import json_files
from jax_selftrain.io.tables import write_table
from jax_selftrain.stats.estimators import mean_and_stderr


def is_text(value: Any) -> bool:
    """Return True if a JSON value is a string without lone surrogates."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def with_stderr(name: str, estimate: tuple[float | None, float | None]) -> dict[str, float | None]:
    """Return the entries of an estimate and of its standard error."""
    return {name: estimate[0], f"{name}_stderr": estimate[1]}


def describe_mean(name: str, values: np.ndarray) -> dict[str, float | None]:
    """Return the entries of a mean; None without values."""
    return with_stderr(name, mean_and_stderr(values) if len(values) else (None, None))


def output_paths(out: str, *suffixes: str) -> tuple[Path, ...]:
    """Return `FILE.json` and `FILE.SUFFIX` for each suffix.

    Raises:
      InputError: `out` is a folder.
    """
    path = Path(out)
    if path.is_dir():
        raise InputError(f"--out {out}: is a folder; give the name of the JSON file to write")
    stem = path.name.removesuffix(".json")
    return path, *(path.with_name(f"{stem}.{suffix}") for suffix in suffixes)


def write_results(
    out: str, config: Any, result: Mapping[str, Any], tables: Mapping[str, pa.Table], timings: Mapping[str, Any]
) -> None:
    """Commit tables, resolved config and timings of a result, then `FILE.json`.

    The JSON holds no timings and no host names, so that equal results are equal bytes.
    """
    path, config_file, timings_file = output_paths(out, "config.yaml", "timings.json")
    for name, table in tables.items():
        write_table(output_paths(out, f"{name}.parquet")[1], table, compression="zstd")
    yaml_io.save(config_file, config)
    json_files.write_json(timings_file, timings)
    json_files.write_json(path, result)
