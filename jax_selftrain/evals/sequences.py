"""Extraction sets: sequences that are known training data, or known not.

A reference is `FILE.npy` (integers [N, T]), `PREFIX.npy:SUFFIX.npy` or the folder of the pair
(lm-extraction-benchmark), `FILE.jsonl` (`tokens` or `text`), `FILE.parquet` or FOLDER[:SPLIT] with a column `tokens`
(pythia-memorized-evals), `input_ids` or `token_ids` (pretokenized Pile), or a `save_to_disk` folder of `datasets`.
Special strings such as `</s>` in a text are special tokens, so that a prefix can begin with BOS. Optional columns are
`index` (sequence id) and `duplicates` (number of copies in the training data). Pickled object arrays are refused.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as types
from numpy.lib.stride_tricks import sliding_window_view

from jax_selftrain.errors import InputError, library_errors_as_input_errors, summarize_error
from jax_selftrain.io.jsonl import check_text, read_jsonl
from jax_selftrain.io.manifest import hash_json, sha256_file

_SPLIT_FILE = re.compile(r"(?P<split>.+?)-\d+-of-\d+.*\.parquet")
_TOKENS = ("tokens", "input_ids", "token_ids")
"""Names of the column of tokens, in order of precedence."""
_DATASET_FILES = ("state.json", "dataset_dict.json")


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
    tokenizer: Callable[[], Any],
    duplicates: str = "",
) -> ExtractionSet:
    """Load the window of each sequence.

    Args:
      reference: see the module.
      window: with an offset, sequences that are too short are skipped, otherwise refused. In a pair of files, the
        prefix ends at the end of the first file, plus the offset.
      vocab_size: upper bound of ids.
      limit: maximum number of sequences to read.
      tokenizer: loads the tokenizer; called only for text.
      duplicates: `.npy` integers [≥N], number of copies of each sequence in the training data.

    Raises:
      InputError: not readable, empty, pickled, not integers, too short, or ids outside the vocabulary.
    """
    where = str(reference)
    table, begin, labels = _read(where, window, limit, tokenizer)
    tokens, lengths = _flatten_tokens(where, table)
    index, copies = _optional_column(where, table, "index"), _optional_column(where, table, "duplicates")
    index = np.arange(len(lengths), dtype=np.int64) if index is None else index
    if duplicates:
        copies = _read_duplicates(duplicates, len(lengths), copies)
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
    starts = (np.cumsum(lengths) - lengths)[members] + begin
    if window.random_offset:
        spare = (lengths[members] - begin - window.length).tolist()
        hashes = [int.from_bytes(hashlib.sha256(f"offset {i}".encode()).digest()[:8]) for i in index[members]]
        starts += np.array([n % (most + 1) for n, most in zip(hashes, spare, strict=True)])
    rows = np.asarray(sliding_window_view(tokens, window.length)[starts])
    outside = np.argwhere((rows < 0) | (rows >= vocab_size))
    if len(outside):
        row, column = outside[0]
        raise InputError(
            f"{where}: token id {rows[row, column]} of sequence {members[row]} is outside the model's vocabulary of "
            f"{vocab_size}; are the sequences of another tokenizer?"
        )
    copies = None if copies is None else copies[members]
    return ExtractionSet(rows.astype(np.int32), index[members], copies, len(lengths) - len(members))


def sequences_fingerprint(reference: str | Path) -> str:
    """Hash the file or files of an extraction set.

    Raises:
      InputError: a file is missing.
    """
    files = _files(str(reference))
    if len(files) == 1:
        return sha256_file(files[0])
    return hash_json({path.name: sha256_file(path) for path in files})


def _read(
    reference: str, window: PromptWindow, limit: int | None, tokenizer: Callable[[], Any]
) -> tuple[pa.Table, int, list[str]]:
    """Return sequences, start of the window, and labels for errors."""
    files, path = _files(reference), Path(reference)
    if files[0].suffix == ".npy":
        arrays = [load_npy(file)[:limit] for file in files]
        for file, array in zip(files, arrays, strict=True):
            if array.ndim != 2:
                found = f"{array.dtype} {list(array.shape)}"
                raise InputError(f"{file}: must be an integer array [sequences, tokens], not {found}")
        if len({len(array) for array in arrays}) > 1:
            first, second = map(len, arrays)
            raise InputError(f"{reference}: {first} prefixes and {second} suffixes; these must be of one set")
        width = arrays[0].shape[1]
        if len(files) == 2 and window.prefix > width + window.offset:
            raise InputError(
                f"{files[0]}: its prefixes have {width} tokens, fewer than --prefix {window.prefix}; shorten it"
            )
        begin = window.offset + (width - window.prefix if len(files) == 2 else 0)
        return _to_table(arrays[0] if len(arrays) == 1 else np.hstack(arrays)), begin, []
    if files[0].suffix == ".parquet":
        table = _concat_shards(reference, {file: _read_parquet(file) for file in files})
    elif path.is_dir() or _split_folder(reference) is not None:
        table = _read_dataset(_split_folder(reference) or path)
    else:
        table, labels = _read_jsonl_table(path, limit, tokenizer)
        return table, window.offset, labels
    return table.slice(0, limit), window.offset, []


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
                f"{file}: has the columns {_names(table)}, but {first} has {_names(head)}; write all shards alike"
            )
    tables = [table.select(head.column_names) for table in shards.values()]
    if any(table.schema.types != head.schema.types for table in tables):
        for table in tables:
            _flatten_tokens(reference, table)  # refuses what is no list of whole numbers
        wide = {"tokens": pa.large_list(pa.int64()), "index": pa.int64(), "duplicates": pa.int64()}
        schema = pa.schema([(name, wide[name]) for name in head.column_names])
        try:
            tables = [table.cast(schema) for table in tables]
        except pa.ArrowException as error:
            raise InputError(f"{reference}: its shards cannot be joined ({summarize_error(error)})") from None
    return pa.concat_tables(tables)


def _names(table: pa.Table) -> str:
    return ", ".join(table.column_names) or "none"


def _to_table(array: np.ndarray) -> pa.Table:
    flat = array.reshape(-1)
    values = pa.array(np.asarray(flat, flat.dtype.newbyteorder("=")))
    offsets = np.arange(len(array) + 1, dtype=np.int64) * array.shape[1]
    return pa.table({"tokens": pa.LargeListArray.from_arrays(offsets, values)})


def _files(reference: str) -> list[Path]:
    """Return the files of a reference."""
    path = Path(reference)
    if path.is_file():
        return [path]
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


def _flatten_tokens(where: str, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Return the concatenated tokens, and the length of each sequence."""
    if "tokens" not in table.column_names:
        raise InputError(f"{where}: has no column `tokens`, `input_ids` or `token_ids` (its columns: {_names(table)})")
    column = table["tokens"]
    lists = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies
    is_list = any(test(lists.type) for test in (types.is_list, types.is_large_list, types.is_fixed_size_list))
    if not is_list or not types.is_integer(lists.type.value_type):
        raise InputError(f"{where}: its column `tokens` holds {lists.type}, not lists of whole numbers")
    flat = lists.flatten()
    if lists.null_count or flat.null_count:
        raise InputError(f"{where}: its column `tokens` has nulls; drop those sequences")
    return flat.to_numpy(), pc.list_value_length(lists).to_numpy().astype(np.int64)


def _optional_column(where: str, table: pa.Table, name: str) -> np.ndarray | None:
    if name not in table.column_names:
        return None
    values = table[name]
    if not types.is_integer(values.type) or values.null_count:
        raise InputError(f"{where}: its column `{name}` must hold a whole number for every sequence")
    return _check_numbers(where, name, values.to_numpy())


def _check_numbers(where: str, name: str, values: np.ndarray) -> np.ndarray:
    """Return int64; refuse larger numbers, and negative counts."""
    if values.size and int(values.max()) >= 2**63:
        raise InputError(f"{where}: `{name}` holds {int(values.max())}, which does not fit 64 bits with a sign")
    if name == "duplicates" and values.size and int(values.min()) < 0:
        raise InputError(f"{where}: `duplicates` holds {int(values.min())}; a number of copies is 0 or more")
    return values.astype(np.int64)


def _read_jsonl_table(path: Path, limit: int | None, tokenizer: Callable[[], Any]) -> tuple[pa.Table, list[str]]:
    """Return a table of the validated lines, and their labels."""
    labels: list[str] = []
    rows: list[list[int]] = []
    optional: dict[str, list[int]] = {"index": [], "duplicates": []}
    tokenizer = functools.cache(tokenizer)
    for where, row in read_jsonl(path, limit):
        if "tokens" in row:
            tokens = row["tokens"]
        else:
            if not isinstance(row.get("text"), str):
                raise InputError(f"{where}: neither `tokens` nor `text`")
            tokens = tokenizer().encode(check_text(row["text"], where), add_special_tokens=False)
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise InputError(f"{where}: `tokens` must be a list of whole numbers")
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


def _read_duplicates(path: str, n: int, given: np.ndarray | None) -> np.ndarray:
    if given is not None:
        raise InputError(f"--duplicate-counts {path}: the sequences have a column `duplicates`; drop one of the two")
    array = load_npy(path)
    if array.ndim != 1 or len(array) < n:
        raise InputError(f"{path}: must hold one number for each of {n} sequences, not {list(array.shape)}")
    return _check_numbers(path, "duplicates", array[:n])


def _read_parquet(path: Path) -> pa.Table:
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            return _select_columns(file.schema_arrow.names, lambda names: file.read(columns=names))
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({' '.join(str(error).split())[:200]})") from None


def _select_columns(found: Sequence[str], read: Callable[[list[str]], pa.Table]) -> pa.Table:
    """Read the known columns; the first of `_TOKENS` becomes `tokens`.

    Without such a column, all are read, so that the error can name them.
    """
    tokens = next((name for name in _TOKENS if name in found), None)
    if tokens is None:
        return read(list(found))
    table = read([tokens, *(name for name in ("index", "duplicates") if name in found)])
    return table.rename_columns(["tokens", *table.column_names[1:]])


def _read_dataset(folder: Path) -> pa.Table:
    import datasets

    with library_errors_as_input_errors(f"{folder}: `datasets.load_from_disk` cannot open it"):
        found = datasets.load_from_disk(str(folder))
        if isinstance(found, datasets.DatasetDict):
            raise InputError(
                f"{folder}: holds the splits {', '.join(found)}; give the folder of one, as {folder}:SPLIT"
            )
        columns = found.column_names
        table = _select_columns(columns, lambda names: found.select_columns(names).with_format("arrow")[:])
    return table
