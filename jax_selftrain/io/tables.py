"""Parquet tables with a checksum of their content.

The checksums of Parquet pages leave out the headers of pages and the footer of the file: a flipped bit there can change
values without an error. Hence the file's metadata holds the SHA-256 of all values, which is verified when it is read.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jax_selftrain.errors import InputError, library_errors_as_input_errors
from jax_selftrain.io import atomic

_CHECKSUM = b"sha256"


def write_table(path: Path, table: pa.Table, *, compression: str = "snappy") -> None:
    """Commit a table with its checksum."""
    metadata = {**(table.schema.metadata or {}), _CHECKSUM: hash_table(table).encode()}
    with atomic.commit_file(path) as temp:
        table = table.replace_schema_metadata(metadata)
        pq.write_table(table, temp, compression=compression, write_page_checksum=True)


def load_table(path: Path, *, remedy: str) -> pa.Table:
    """Read a table, and verify its checksum if it has one.

    Raises:
      InputError: the file is missing, damaged or not a table; ends with `remedy`.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; {remedy}")
    with library_errors_as_input_errors(f"{path}: cannot be read as Parquet", remedy):
        table = pq.read_table(path, page_checksum_verification=True)
        metadata = dict(table.schema.metadata or {})
        stored = metadata.pop(_CHECKSUM, None)
        table = table.replace_schema_metadata(metadata or None)
        is_damaged = stored is not None and stored != hash_table(table).encode()
    if is_damaged:
        raise InputError(f"{path}: the file is damaged: it does not match its checksum; {remedy}")
    return table


def hash_table(table: pa.Table) -> str:
    """Return the SHA-256 (hex) of names, types, values and metadata.

    It does not depend on the chunks of the columns.
    """
    digest = hashlib.sha256()
    for key, value in sorted((table.schema.metadata or {}).items()):
        digest.update(_with_length(key) + _with_length(value))
    for name in table.column_names:
        digest.update(_with_length(name.encode()) + _hash_column(table[name].chunks, table.schema.field(name).type))
    return digest.hexdigest()


def _with_length(data: bytes) -> bytes:
    return len(data).to_bytes(8, "big") + data


def _hash_column(chunks: Sequence[pa.Array], type: Any) -> bytes:
    if pa.types.is_dictionary(type):
        return _hash_column([chunk.dictionary_decode() for chunk in chunks], type.value_type)
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk.is_valid().to_numpy(zero_copy_only=False).tobytes())
    if pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type):
        for chunk in chunks:
            digest.update(pc.list_value_length(chunk).fill_null(0).to_numpy().tobytes())
        digest.update(_hash_column([chunk.flatten() for chunk in chunks], type.value_type))
        return digest.digest()
    digest.update(str(type).removeprefix("large_").encode())
    if type in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        chunks = [chunk.cast(pa.large_binary()).fill_null(b"") for chunk in chunks]
        for chunk in chunks:
            digest.update(pc.binary_length(chunk).to_numpy().tobytes())
        for chunk in chunks:
            digest.update(_joined_bytes(chunk))
    elif not pa.types.is_null(type):
        for chunk in chunks:
            values = chunk.fill_null(False if pa.types.is_boolean(type) else 0).to_numpy(False)
            if values.dtype == object:
                raise TypeError(f"a column of type {type} has no checksum")
            digest.update(values.tobytes())
    return digest.digest()


def _joined_bytes(chunk: pa.LargeBinaryArray) -> memoryview:
    """Return the bytes of all values of an array."""
    _, offsets, data = chunk.buffers()
    if data is None or not len(chunk):
        return memoryview(b"")
    bounds = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
    return memoryview(data)[bounds[0] : bounds[-1]]
