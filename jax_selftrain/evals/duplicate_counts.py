"""Numbers of copies of sequences in training data."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from jax_selftrain.errors import InputError, library_errors_as_input_errors
from jax_selftrain.evals.sequence_files import NUMBERS, check_numbers, format_columns, load_npy, optional_column
from jax_selftrain.io.jsonl import read_jsonl


def read_duplicates(path: str, n: int, index: np.ndarray | None) -> np.ndarray:
    """Read the number of copies of each sequence.

    Args:
      path: `.npy`, a number for each row; or Parquet, CSV or JSONL with `index` and `duplicates`.
      n: number of sequences.
      index: sequence ids [n], with which the rows of a table are joined; None: the set has no column `index`.

    Returns int64 [n].

    Raises:
      InputError: not readable, a table for a set without `index`, a sequence has no number or two, or numbers are
        negative.
    """
    file = Path(path)
    if file.suffix == ".npy":
        array = load_npy(path)
        if array.ndim != 1 or len(array) < n:
            raise InputError(f"{path}: must hold one number for each of {n} sequences, not {list(array.shape)}")
        return check_numbers(path, "duplicates", array[:n])
    if index is None:
        raise InputError(
            f"--duplicate-counts {path}: a table is joined by `index`, which the sequences do not have; add it, or "
            "give a number for each sequence as .npy"
        )
    if not file.is_file():
        raise InputError(f"{path}: no such file")
    with library_errors_as_input_errors(f"{path}: cannot be read as a table"):
        if file.suffix == ".parquet":
            table = pq.read_table(file)
        elif file.suffix == ".csv":
            table = pyarrow.csv.read_csv(file)
        elif file.name.endswith((".jsonl", ".jsonl.gz", ".json")):
            table = pa.Table.from_pylist([row for _, row in read_jsonl(file)])
        else:
            raise InputError(f"{path}: is none of .npy, .parquet, .csv and .jsonl")
    if len({*table.column_names}) < len(table.column_names):
        raise InputError(f"{path}: two of its columns have one name ({format_columns(table)})")
    ids, copies = (optional_column(path, table, name) for name in NUMBERS)
    if ids is None or copies is None:
        raise InputError(f"{path}: needs the columns `index` and `duplicates` (its columns: {format_columns(table)})")
    order = np.argsort(ids, kind="stable")
    ids, copies = ids[order], copies[order]
    if repeated := int((ids[1:] == ids[:-1]).sum()):
        raise InputError(f"{path}: {repeated} rows repeat an `index`; each sequence has one number of copies")
    positions = np.minimum(np.searchsorted(ids, index), max(len(ids) - 1, 0))
    missing = index if not len(ids) else index[ids[positions] != index]
    if len(missing):
        raise InputError(f"{path}: has no row for {len(missing)} of {n} sequences, such as index {missing[0]}")
    return copies[positions]
