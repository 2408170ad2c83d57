"""JSON Lines are read in order; damaged lines are named."""

from __future__ import annotations

import gzip
import os
import re

import pytest

from jax_selftrain.errors import InputError
from jax_selftrain.io.jsonl import check_text, read_jsonl, write_jsonl


def test_what_is_written_is_read_back_with_file_and_line(tmp_path):
    rows = [{"text": "é\u2028"}, {"n": 1.5, "list": [None, True]}, {}]
    path = tmp_path / "new" / "rows.jsonl"
    write_jsonl(path, rows)
    assert list(read_jsonl(path)) == [(f"{path}:{i}", row) for i, row in enumerate(rows, start=1)]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_jsonl(path, [{"loss": float("nan")}])


def test_blank_lines_line_ends_and_a_byte_order_mark_are_no_objects(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n  \r\n{"a": 1}\r\n\n{"a": 2}')
    assert [(where[-2:], row["a"]) for where, row in read_jsonl(path)] == [(":3", 1), (":5", 2)]


def test_lines_after_the_limit_are_not_checked(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\nbroken\n')
    assert [row["a"] for _, row in read_jsonl(path, limit=2)] == [1, 2]
    assert list(read_jsonl(path, limit=0)) == []
    with pytest.raises(InputError, match=r"rows\.jsonl:3: not a line of JSON"):
        list(read_jsonl(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "not a line of JSON"),
        (b"\xff\xfe", "not a line of JSON"),
        (b"[" * 100_000, "not a line of JSON"),
        (b"[1]", "list instead of a JSON object"),
        (b"null", "NoneType instead of a JSON object"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{}\n\n" + line + b"\n{}\n")
    with pytest.raises(InputError, match=re.escape(f"{path}:3: {message}")):
        list(read_jsonl(path))


def test_gzip_is_decompressed_and_other_formats_are_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}\n'))
    assert list(read_jsonl(path)) == [(f"{path}:1", {"a": 1}), (f"{path}:2", {"a": 2})]
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-20])
    with pytest.raises(InputError, match=r"rows.jsonl.gz: cannot be read"):
        list(read_jsonl(path))
    for start, name in ((b"PAR1", "a Parquet file"), (b"PK\x03\x04", "a ZIP archive"), (b"BZh9", "bzip2")):
        path.write_bytes(start + bytes(100))
        with pytest.raises(InputError, match=rf"rows.jsonl.gz: is .*{name}.*, not JSON Lines"):
            list(read_jsonl(path))


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match=r"pipe.jsonl: is no regular file"):
        list(read_jsonl(tmp_path / "pipe.jsonl"))


def test_texts_are_valid_utf8():
    assert check_text("é", "f:1") == check_text("é".encode(), "f:1") == "é"
    for value in ("\ud83d", b"\xff"):
        with pytest.raises(InputError, match="f:1: the text is not valid UTF-8"):
            check_text(value, "f:1")
    with pytest.raises(InputError, match="f:1: the text field holds int, not text"):
        check_text(3, "f:1")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.jsonl: no such file"):
        list(read_jsonl(tmp_path / "absent.jsonl"))
    with pytest.raises(InputError, match="cannot be read"):
        list(read_jsonl(tmp_path))
