"""Files that the package wrote are refused when they are damaged."""

from __future__ import annotations

import json
import random
from pathlib import Path

from jax_selftrain.errors import InputError
from jax_selftrain.io.json_files import CHECKSUM, hash_json, read_json, write_json
from jax_selftrain.io.jsonl import log_entry, read_log

CONTENT = {"temperature": 0.7, "texts": {"é": [1, 2.5, None]}, "n": 2**60, "name": "a \u2028 b"}


def test_a_file_has_the_checksum_of_its_content(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", CONTENT)
    assert read_json(tmp_path / "a.json") == CONTENT
    written = json.loads((tmp_path / "a.json").read_text())
    assert written.pop(CHECKSUM) == hash_json(CONTENT) == hash_json(written)
    write_json(tmp_path / "foreign.json", CONTENT, checksum=False)
    assert json.loads((tmp_path / "foreign.json").read_text()) == read_json(tmp_path / "foreign.json") == CONTENT


def test_every_flipped_bit_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, CONTENT)
    whole, harmless = path.read_bytes(), 0
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = read_json(path)
        except InputError:
            continue
        harmless += 1
        assert {key: value for key, value in found.items() if key in CONTENT} == CONTENT
    assert harmless < 8 * len(whole) / 10


def test_damaged_lines_of_a_log_are_named_and_a_cut_line_is_dropped(tmp_path: Path) -> None:
    path, rows = tmp_path / "log.jsonl", [{"step": i, "loss": 1.5 / (i + 1)} for i in range(20)]
    whole = "".join(map(log_entry, rows)).encode()
    for end in (len(whole), len(whole) - 1, len(whole) - 20):
        path.write_bytes(whole[:end])
        assert read_log(path) == rows[: whole[:end].count(b"\n")]
    draw = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole) - 1)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            found = read_log(path)
        except InputError:
            continue
        else:
            assert [{key: row[key] for key in ("step", "loss")} for row in found] == rows
