"""Token files of Megatron-LM and GPT-NeoX: `NAME.bin` with its index `NAME.idx`."""

import struct
from pathlib import Path

import numpy as np
import pyarrow as pa

from jax_selftrain.errors import InputError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the dtype, number of sequences, number of documents."""
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def read_megatron_dataset(path: Path, limit: int | None = None) -> pa.Table:
    """Memory-map the sequences of `NAME.bin`, a column `tokens` of lists of integers.

    Args:
      path: `NAME.bin` or `NAME.idx`; both are there.
      limit: maximum number of sequences.

    Raises:
      InputError: a file is truncated or of another format.
    """
    index, data = path.with_suffix(".idx"), path.with_suffix(".bin")
    with index.open("rb") as opened:
        header = opened.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise InputError(f"{index}: is no index of a memory-mapped Megatron data set")
    _, version, code, sequences, _ = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise InputError(f"{index}: version {version} with dtype {code} is not supported; expected whole numbers")
    if index.stat().st_size < _HEADER.size + 12 * sequences:
        raise InputError(f"{index}: is truncated; copy it again")
    dtype, count = np.dtype(_DTYPES[code]), sequences if limit is None else min(limit, sequences)
    lengths = np.fromfile(index, "<i4", count, offset=_HEADER.size).astype(np.int64)
    pointers = np.fromfile(index, "<i8", count, offset=_HEADER.size + 4 * sequences)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if lengths.size and (lengths.min() < 0 or (pointers != offsets[:-1] * dtype.itemsize).any()):
        raise InputError(f"{index}: its sequences do not follow one another in {data.name}; copy both files again")
    if data.stat().st_size < offsets[-1] * dtype.itemsize:
        raise InputError(f"{data}: is shorter than {index.name} says; copy it again")
    tokens = np.memmap(data, dtype, "r", shape=(int(offsets[-1]),)) if offsets[-1] else np.zeros(0, dtype)
    return pa.table({"tokens": pa.LargeListArray.from_arrays(offsets, pa.array(tokens))})
