"""Files of extraction sets, as tables of tokens."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as types

from jax_selftrain import hub
from jax_selftrain.errors import InputError, library_errors_as_input_errors, summarize_error
from jax_selftrain.evals.megatron_dataset import read_megatron_dataset
from jax_selftrain.io.jsonl import check_text, read_jsonl

_SPLIT_FILE = re.compile(r"(?P<split>.+?)-\d+-of-\d+.*\.parquet")
_IDS = ("tokens", "input_ids", "token_ids")
"""Names of the column of token ids, in order of precedence."""
NUMBERS = ("index", "duplicates")
"""Names of the optional columns."""
_DATASET_FILES = ("state.json", "dataset_dict.json")
_MEGATRON = (".bin", ".idx")


def read_table(
    reference: str, *, limit: int | None, tokenizer: Callable[[], Any], column: str = ""
) -> tuple[pa.Table, int | None, list[str]]:
    """Read the sequences of a reference (`sequences`).

    Returns:
      A table with lists of integers in `tokens`, and perhaps `index` and `duplicates`; the length of the prefixes, if
      these are a file of their own; and labels of the rows for errors, if rows are lines.

    Raises InputError.
    """
    files = sequence_files(reference)
    if column and files[0].suffix in (".npy", *_MEGATRON):
        raise InputError(f"{files[0]}: has no columns; drop --column {column}")
    if files[0].suffix == ".npy":
        arrays = [load_npy(file)[:limit] for file in files]
        for file, array in zip(files, arrays, strict=True):
            if array.ndim != 2:
                found = f"{array.dtype} {list(array.shape)}"
                raise InputError(f"{file}: must be an integer array [sequences, tokens], not {found}")
        if len({len(array) for array in arrays}) > 1:
            first, second = map(len, arrays)
            raise InputError(f"{reference}: {first} prefixes and {second} suffixes; these must be of one set")
        if len(arrays) == 1:
            return _to_table(arrays[0]), None, []
        return _to_table(np.hstack(arrays)), arrays[0].shape[1], []
    if files[0].suffix in _MEGATRON:
        return read_megatron_dataset(files[0], limit), None, []
    if (columns := _read_columns(reference, column)) is not None:
        return _encode_texts(reference, columns.slice(0, limit), tokenizer), None, []
    table, labels = _read_jsonl_table(Path(reference), limit, tokenizer, column)
    return table, None, labels


def _read_columns(reference: str, column: str) -> pa.Table | None:
    """Read Parquet files or a saved data set; None for JSON Lines."""
    files, folder = sequence_files(reference), _split_folder(reference) or Path(reference)
    if files[0].suffix == ".parquet":
        return _concat_shards(reference, {file: _read_parquet(file, column) for file in files})
    return _read_dataset(folder, column) if folder.is_dir() else None


def download_sequences(reference: str) -> str:
    """Resolve a data set of the hub (`hub.dataset_split`).

    Returns its local FOLDER:SPLIT; other references as they are.

    Raises InputError if the download fails.
    """
    found = None if _split_folder(reference) else hub.parse_dataset_split(reference)
    if found is None:
        return reference
    first, *_ = found.files()  # downloads all
    return f"{first.parent}:{found.split}"


def holds_text(reference: str, column: str = "") -> bool:
    """Return True if a set has texts rather than token ids.

    Raises InputError if it cannot be read.
    """
    reference = download_sequences(reference)
    if sequence_files(reference)[0].suffix in (".npy", *_MEGATRON):
        return False
    if (columns := _read_columns(reference, column)) is not None:
        return "text" in columns.column_names
    _, row = next(iter(read_jsonl(Path(reference), 1)), ("", {}))
    name = _column_of_tokens(list(row), column)
    return name is not None and name not in _IDS and isinstance(row[name], str)


def _encode_texts(where: str, table: pa.Table, tokenizer: Callable[[], Any]) -> pa.Table:
    """Replace the column `text` by `tokens`."""
    if "text" not in table.column_names or "tokens" in table.column_names:
        return table
    encode = tokenizer().encode
    rows = [
        encode(check_text(_require_text(text, label), label), add_special_tokens=False)
        for i, text in enumerate(table["text"].to_pylist())
        for label in [f"{where}: row {i}"]
    ]
    return table.drop_columns("text").append_column("tokens", pa.array(rows, pa.list_(pa.int64())))


def _require_text(text: str | None, where: str) -> str:
    if text is None:
        raise InputError(f"{where}: has no text; drop it")
    return text


def _is_text(type_: pa.DataType) -> bool:
    return types.is_string(type_) or types.is_large_string(type_)


def _split_folder(reference: str) -> Path | None:
    """Return the folder of a split of a `save_to_disk` data set, FOLDER:SPLIT."""
    first, _, second = reference.rpartition(":")
    folder = Path(first) / second
    is_split = bool(first) and not Path(reference).exists() and (Path(first) / _DATASET_FILES[1]).is_file()
    return folder if is_split and folder.is_dir() else None


def _concat_shards(reference: str, shards: Mapping[Path, pa.Table]) -> pa.Table:
    """Concatenate shards, whose integers may have unlike types."""
    (first, head), *others = shards.items()
    for file, table in others:
        if {*table.column_names} != {*head.column_names}:
            raise InputError(
                f"{file}: has the columns {format_columns(table)}, but {first} has {format_columns(head)}; write all "
                "shards alike"
            )
    tables = [table.select(head.column_names) for table in shards.values()]
    if any(table.schema.types != head.schema.types for table in tables):
        for table in tables:
            if "tokens" in table.column_names:
                flatten_tokens(reference, table)  # refuses what is no list of whole numbers
        wide = {"tokens": pa.large_list(pa.int64()), "text": pa.large_string()} | dict.fromkeys(NUMBERS, pa.int64())
        schema = pa.schema([(name, wide[name]) for name in head.column_names])
        try:
            tables = [table.cast(schema) for table in tables]
        except pa.ArrowException as error:
            raise InputError(f"{reference}: its shards cannot be joined ({summarize_error(error)})") from None
    return pa.concat_tables(tables)


def format_columns(table: pa.Table) -> str:
    """Return the names of the columns for an error."""
    return ", ".join(table.column_names) or "none"


def _to_table(array: np.ndarray) -> pa.Table:
    flat = array.reshape(-1)
    values = pa.array(np.asarray(flat, flat.dtype.newbyteorder("=")))
    offsets = np.arange(len(array) + 1, dtype=np.int64) * array.shape[1]
    return pa.table({"tokens": pa.LargeListArray.from_arrays(offsets, values)})


def sequence_files(reference: str) -> list[Path]:
    """Return the files of a reference.

    Raises InputError if there are none.
    """
    path = Path(reference)
    if path.is_file():
        if path.suffix not in _MEGATRON:
            return [path]
        pair = [path.with_suffix(suffix) for suffix in _MEGATRON]
        for file in pair:
            if not file.is_file():
                raise InputError(f"{file}: no such file; a Megatron data set is NAME.bin with NAME.idx")
        return pair
    if reference.endswith(".npy") and ".npy:" in reference:
        pair = [Path(f"{name}.npy") for name in reference.removesuffix(".npy").split(".npy:", 1)]
        for file in pair:
            if not file.is_file():
                raise InputError(f"{file}: no such file")
        return pair
    first, colon, second = reference.rpartition(":")
    folder, split = (Path(first), second) if colon and not path.is_dir() else (path, "")
    if (inner := _split_folder(reference)) is not None:
        folder, split = inner, ""
    if not folder.is_dir():
        raise InputError(f"{reference}: no such file or folder")
    if any((folder / name).is_file() for name in _DATASET_FILES):
        return sorted(file for file in folder.rglob("*") if file.is_file())
    pairs = [[file, folder / file.name.replace("prefix.npy", "suffix.npy")] for file in folder.glob("*prefix.npy")]
    pairs = [pair for pair in pairs if pair[1].is_file()]
    if len(pairs) == 1:
        return pairs[0]
    tables = sorted(folder.glob("*.parquet"))
    splits = {file: match["split"] for file in tables if (match := _SPLIT_FILE.fullmatch(file.name))}
    if split:
        tables = [file for file in tables if splits.get(file) == split]
    names = sorted(set(splits.values()))
    if not tables:
        raise InputError(
            f"{reference}: has no Parquet files of that split (its splits: {', '.join(names) or 'none'}), no "
            "`save_to_disk` data set and no pair of …prefix.npy and …suffix.npy"
        )
    if not split and len(names) > 1:
        raise InputError(f"{folder}: holds the splits {', '.join(names)}; name one of them as {folder}:SPLIT")
    return tables


def flatten_tokens(where: str, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Return the concatenated tokens, and the length of each sequence.

    Raises InputError if the column `tokens` has no lists of integers.
    """
    if "tokens" not in table.column_names:
        raise InputError(
            f"{where}: has no column `tokens`, `input_ids`, `token_ids` or `text` (its columns: "
            f"{format_columns(table)}); name another one with --column"
        )
    column = table["tokens"]
    lists = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies
    is_list = any(test(lists.type) for test in (types.is_list, types.is_large_list, types.is_fixed_size_list))
    if not is_list or not types.is_integer(lists.type.value_type):
        raise InputError(f"{where}: its column `tokens` holds {lists.type}, not lists of whole numbers")
    flat = lists.flatten()
    if lists.null_count or flat.null_count:
        raise InputError(f"{where}: its column `tokens` has nulls; drop those sequences")
    return flat.to_numpy(), pc.list_value_length(lists).to_numpy().astype(np.int64)


def optional_column(where: str, table: pa.Table, name: str) -> np.ndarray | None:
    """Return a column of whole numbers as int64, or None.

    Raises InputError if a number is missing, negative in `duplicates`, or too large.
    """
    if name not in table.column_names:
        return None
    values = table[name]
    if not types.is_integer(values.type) or values.null_count:
        raise InputError(f"{where}: its column `{name}` must hold a whole number for every sequence")
    return check_numbers(where, name, values.to_numpy())


def check_numbers(where: str, name: str, values: np.ndarray) -> np.ndarray:
    """Return int64.

    Raises InputError for larger numbers and negative counts.
    """
    if values.size and int(values.max()) >= 2**63:
        raise InputError(f"{where}: `{name}` holds {int(values.max())}, which does not fit 64 bits with a sign")
    if name == "duplicates" and values.size and int(values.min()) < 0:
        raise InputError(f"{where}: `duplicates` holds {int(values.min())}; a number of copies is 0 or more")
    return values.astype(np.int64)


def _read_jsonl_table(
    path: Path, limit: int | None, tokenizer: Callable[[], Any], column: str
) -> tuple[pa.Table, list[str]]:
    """Return a table of the validated lines, and their labels."""
    labels: list[str] = []
    rows: list[list[int]] = []
    optional: dict[str, list[int]] = {name: [] for name in NUMBERS}
    tokenizer = functools.cache(tokenizer)
    for where, row in read_jsonl(path, limit):
        name = _column_of_tokens(list(row), column)
        if name is None:
            known = f"`{column}`" if column else "`tokens`, `input_ids`, `token_ids` or `text`"
            raise InputError(f"{where}: has no field {known}")
        tokens = row[name]
        if isinstance(tokens, str) and name not in _IDS:
            tokens = tokenizer().encode(check_text(tokens, where), add_special_tokens=False)
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise InputError(
                f"{where}: `{name}` must be a list of whole numbers" + ("" if name in _IDS else ", or text")
            )
        if any(abs(token) >= 2**31 for token in tokens):
            raise InputError(f"{where}: a token id does not fit 32 bits")
        labels.append(where)
        rows.append(tokens)
        for name in optional.keys() & row.keys():
            if type(row[name]) is not int or abs(row[name]) >= 2**63:
                raise InputError(f"{where}: `{name}` must be a whole number")
            optional[name].append(row[name])
    for name, values in optional.items():
        if values and len(values) != len(rows):
            raise InputError(
                f"{path}: only {len(values)} of its {len(rows)} lines have `{name}`; give it to all or none"
            )
    columns = {name: pa.array(values, pa.int64()) for name, values in optional.items() if values}
    return pa.table({"tokens": pa.array(rows, pa.list_(pa.int64())), **columns}), labels


def load_npy(path: str | Path) -> np.ndarray:
    """Memory-map an integer array.

    Raises:
      InputError: missing, not a plain array, pickled, or not of integers.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{path}: not a plain .npy array ({' '.join(str(error).split())}); write it with numpy.save, without "
            "pickled objects"
        ) from None
    if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.integer):
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive of arrays"
        raise InputError(f"{path}: must be an integer array, not {found}")
    return array


def _read_parquet(path: Path, column: str) -> pa.Table:
    try:
        with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
            return _select_columns(path, file.schema_arrow.names, column, lambda names: file.read(columns=names))
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({' '.join(str(error).split())[:200]})") from None


def _select_columns(path: Path, found: Sequence[str], column: str, read: Callable[[list[str]], pa.Table]) -> pa.Table:
    """Read the known columns; that of tokens or texts becomes `tokens`.

    Without such a column, all are read, so that the error can name them.
    """
    if repeated := [name for name in found if found.count(name) > 1]:
        raise InputError(f"{path}: has {found.count(repeated[0])} columns `{repeated[0]}`; rename or drop one")
    tokens = _column_of_tokens(found, column)
    if tokens is None:
        if column:
            raise InputError(f"{path}: has no column `{column}` (its columns: {', '.join(found)})")
        return read(list(found))
    table = read([tokens, *(name for name in NUMBERS if name in found)])
    is_text = tokens not in _IDS and _is_text(table[tokens].type)
    return table.rename_columns(["text" if is_text else "tokens", *table.column_names[1:]])


def _column_of_tokens(found: Sequence[str], column: str) -> str | None:
    names = (column,) if column else (*_IDS, "text")
    return next((name for name in names if name in found), None)


def _read_dataset(folder: Path, column: str) -> pa.Table:
    import datasets

    with library_errors_as_input_errors(f"{folder}: `datasets.load_from_disk` cannot open it"):
        found = datasets.load_from_disk(str(folder))
        if isinstance(found, datasets.DatasetDict):
            raise InputError(
                f"{folder}: holds the splits {', '.join(found)}; give the folder of one, as {folder}:SPLIT"
            )
        names = found.column_names
        table = _select_columns(folder, names, column, lambda some: found.select_columns(some).with_format("arrow")[:])
    return table
