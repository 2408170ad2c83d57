"""Parquet tables: flipped bits are refused or harmless."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jax_selftrain.errors import InputError
from jax_selftrain.io.tables import hash_table, load_table, write_table

TABLE = pa.table(
    {
        "item": pa.array(range(6), pa.int64()),
        "value": [-1.5, 2.0, None, float("nan"), 0.25, -0.0],
        "is_right": [True, False, None, True, True, False],
        "text": ["", "é", None, "long text", "a", "b"],
        "bytes": [b"\xff", b"", None, b"a", b"bc", b"d"],
        "label": pa.array(["a", None, "bc", "", "d", "e"], pa.large_string()),
        "class": pa.array(["seen", "held_out", None, "seen", "seen", "partial"]).dictionary_encode(),
        "tokens": pa.array([[1, 2], [], None, [3], [4, 5, 6], [7]], pa.list_(pa.int32())),
        "pieces": [["a", "bc"], [], None, ["d"], ["", None, "e"], ["f"]],
        "pair": pa.array([[1.0, 2.0]] * 6, pa.list_(pa.float32(), 2)),
    }
).replace_schema_metadata({"model": "m"})
REMEDY = "write it again"


def test_a_table_is_read_as_it_was_written(tmp_path):
    write_table(tmp_path / "t.parquet", TABLE)
    found = load_table(tmp_path / "t.parquet", remedy=REMEDY)
    assert found.schema.metadata == TABLE.schema.metadata
    assert hash_table(found) == hash_table(TABLE)
    assert repr(found.to_pydict()) == repr(TABLE.to_pydict())


def test_the_hash_depends_on_values_and_not_on_chunks():
    chunked = pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(1, 3), TABLE.slice(4)])
    assert chunked["text"].num_chunks == 3
    assert hash_table(chunked) == hash_table(TABLE)
    others = [TABLE.slice(1), TABLE.replace_schema_metadata({"model": "n"}), TABLE.drop_columns("pair")]
    moved = TABLE.set_column(8, "pieces", [[["a", "b"], ["c"], None, ["d"], ["", None, "e"], ["f"]]])
    assert len({hash_table(table) for table in (TABLE, moved, *others)}) == 5


def test_flipped_bits_are_refused_or_harmless(tmp_path):
    """Without the checksum of the content, flips in the headers of pages change values silently.

    A flip can remove all metadata, which hold the checksum and the types of Arrow; it has then changed no value.
    """
    path = tmp_path / "t.parquet"
    write_table(path, TABLE)
    content = path.read_bytes()
    messages = []
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(np.random.default_rng(position).integers(8))
        path.write_bytes(damaged)
        try:
            found = load_table(path, remedy=REMEDY)
        except InputError as error:
            messages.append(str(error))
        else:
            assert repr(found.to_pydict()) == repr(TABLE.to_pydict()), position
    assert len(messages) > len(content) / 9
    assert all(str(path) in message and message.endswith(REMEDY) for message in messages)


def test_tables_of_other_programs_have_no_checksum_and_are_read(tmp_path):
    pq.write_table(TABLE, tmp_path / "t.parquet")
    assert hash_table(load_table(tmp_path / "t.parquet", remedy=REMEDY)) == hash_table(TABLE)
    with pytest.raises(InputError, match="no such file; write it again"):
        load_table(tmp_path / "none.parquet", remedy=REMEDY)
