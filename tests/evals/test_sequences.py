"""Extraction sets give the same tokens in every format; errors are named."""

import hashlib
import json
import struct

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from jax_selftrain import hub
from jax_selftrain.errors import InputError
from jax_selftrain.evals import held_out_half
from jax_selftrain.evals.sequence_files import holds_text
from jax_selftrain.evals.sequences import (
    ExtractionSet,
    PromptWindow,
    load_sequences,
    sequences_fingerprint,
)

WINDOW = PromptWindow(8, 24)
ROWS = np.random.default_rng(0).integers(3, 512, (6, 40))


def load(reference, window=WINDOW, **options) -> ExtractionSet:
    def no_tokenizer():
        raise AssertionError("there is no text to encode")

    return load_sequences(reference, window, **({"vocab_size": 512, "tokenizer": no_tokenizer} | options))


def table(rows=ROWS, **columns) -> pa.Table:
    """Return a table with the columns of EleutherAI/pythia-memorized-evals."""
    tokens = pa.array([row.tolist() for row in rows], pa.list_(pa.int64()))
    return pa.table({"index": pa.array(range(100, 100 + len(rows)), pa.int64()), "tokens": tokens, **columns})


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_format_gives_the_same_tokens(tmp_path):
    np.save(tmp_path / "rows.npy", ROWS.astype(np.uint16))
    pq.write_table(table(), tmp_path / "rows.parquet")
    lines(tmp_path / "rows.jsonl", [{"tokens": row.tolist(), "index": 100 + i} for i, row in enumerate(ROWS)])
    plain = load(tmp_path / "rows.npy")
    assert plain.sequence_id.tolist() == list(range(6))
    for name in ("rows.parquet", "rows.jsonl"):
        found = load(tmp_path / name)
        assert found.sequence_id.tolist() == list(range(100, 106))
        np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_array_equal(plain.tokens, ROWS[:, :32])
    assert load(tmp_path / "rows.parquet", limit=2).sequence_id.tolist() == [100, 101]


def test_shards_of_unlike_integers_are_joined_and_other_columns_are_refused(tmp_path):
    first, second = table(ROWS[:4]), table(ROWS[4:])
    narrow = second.cast(pa.schema([("index", pa.int32()), ("tokens", pa.list_(pa.uint16()))]))
    pq.write_table(first, tmp_path / "train-00000-of-00002.parquet")
    pq.write_table(narrow, tmp_path / "train-00001-of-00002.parquet")
    found = load(tmp_path)
    np.testing.assert_array_equal(found.tokens, ROWS[:, :32])
    assert found.sequence_id.tolist() == [100, 101, 102, 103, 100, 101]
    pq.write_table(second.select(["tokens"]), tmp_path / "train-00001-of-00002.parquet")
    with pytest.raises(InputError, match=r"00001-of-00002.parquet: has the columns tokens, but .* has tokens, index"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["input_ids", "token_ids"])
def test_columns_of_pretokenized_data_are_tokens(tmp_path, name):
    datasets = pytest.importorskip("datasets")
    pq.write_table(table().select(["tokens"]).rename_columns([name]), tmp_path / "rows.parquet")
    np.testing.assert_array_equal(load(tmp_path / "rows.parquet").tokens, ROWS[:, :32])
    datasets.Dataset.from_dict({name: ROWS.tolist()}).save_to_disk(tmp_path / "saved")
    np.testing.assert_array_equal(load(tmp_path / "saved").tokens, ROWS[:, :32])


def test_a_split_of_a_saved_data_set_is_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_dict({"tokens": ROWS.tolist()})
    datasets.DatasetDict({"train": part, "test": part.select([0])}).save_to_disk(tmp_path / "10:30" / "both")
    folder = tmp_path / "10:30" / "both"
    np.testing.assert_array_equal(load(f"{folder}:train").tokens, ROWS[:, :32])
    assert sequences_fingerprint(f"{folder}:train") == sequences_fingerprint(folder / "train")
    with pytest.raises(InputError, match=r"both: holds the splits train, test; .* as .*both:SPLIT"):
        load(folder)


@pytest.mark.parametrize("damage", ["{}", "[]", "{"])
@pytest.mark.parametrize("file", ["state.json", "dataset_info.json"])
def test_damaged_saved_data_sets_are_one_sentence(tmp_path, file, damage):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"tokens": ROWS.tolist()}).save_to_disk(tmp_path)
    (tmp_path / file).write_text(damage)
    if (file, damage) == ("dataset_info.json", "{}"):
        assert len(load(tmp_path).tokens) == len(ROWS)  # nothing that is needed is missing
        return
    with pytest.raises(InputError, match="cannot open it"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("duplicates", [-1] * 6, "`duplicates` holds -1"),
        ("index", [2**63] * 6, "`index` holds 9223372036854775808, which does not fit"),
    ],
)
def test_numbers_that_would_vanish_or_wrap_are_refused(tmp_path, column, values, message):
    array = pa.array(values, pa.uint64() if values[0] > 0 else pa.int64())
    columns = table().select(["tokens"]).append_column(column, array)
    pq.write_table(columns, tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=message):
        load(tmp_path / "rows.parquet")


def test_negative_duplicates_are_refused_in_every_form(tmp_path):
    rows = [{"tokens": row.tolist(), "duplicates": -3} for row in ROWS]
    with pytest.raises(InputError, match="`duplicates` holds -3"):
        load(lines(tmp_path / "rows.jsonl", rows))
    np.save(tmp_path / "counts.npy", np.full(6, -2))
    np.save(tmp_path / "rows.npy", ROWS)
    with pytest.raises(InputError, match="`duplicates` holds -2"):
        load(tmp_path / "rows.npy", duplicates=str(tmp_path / "counts.npy"))


def test_special_strings_and_damaged_text(tmp_path, tiny_model):
    tokenizer = hub.open_model(tiny_model("llama")).tokenizer
    text = "the lamp </s> and the river " * 4
    found = load(lines(tmp_path / "a.jsonl", [{"text": text}]), PromptWindow(4, 8), tokenizer=lambda: tokenizer)
    expected = tokenizer.encode(text, add_special_tokens=False)
    assert 2 in expected  # a prefix can begin with BOS
    assert found.tokens[0].tolist() == expected[:12]
    (tmp_path / "b.jsonl").write_text('{"text": "a \\ud83d b"}\n')
    with pytest.raises(InputError, match=r"b.jsonl:1: the text is not valid UTF-8"):
        load(tmp_path / "b.jsonl", tokenizer=lambda: tokenizer)


def test_a_folder_of_parquet_is_read_in_the_order_of_its_files_split_by_split(tmp_path):
    pq.write_table(table(ROWS[:4]), tmp_path / "duped.70m-00000-of-00002-a1b2.parquet")
    pq.write_table(table(ROWS[4:]), tmp_path / "duped.70m-00001-of-00002-c3d4.parquet")
    np.testing.assert_array_equal(load(tmp_path).tokens, ROWS[:, :32])
    alone = sequences_fingerprint(tmp_path)
    pq.write_table(table(ROWS[::-1]), tmp_path / "duped.12b-00000-of-00001-e5f6.parquet")
    with pytest.raises(InputError, match=r"holds the splits duped\.12b, duped\.70m; name one of them"):
        load(tmp_path)
    np.testing.assert_array_equal(load(f"{tmp_path}:duped.70m").tokens, ROWS[:, :32])
    np.testing.assert_array_equal(load(f"{tmp_path}:duped.12b").tokens, ROWS[::-1, :32])
    assert sequences_fingerprint(f"{tmp_path}:duped.70m") == alone != sequences_fingerprint(f"{tmp_path}:duped.12b")
    with pytest.raises(InputError, match=r"its splits: duped\.12b, duped\.70m"):
        load(f"{tmp_path}:deduped.70m")


def test_a_pair_of_arrays_meets_where_the_prefix_ends(tmp_path):
    """lm-extraction-benchmark: a shorter prefix is the end of the file's prefix."""
    whole = np.random.default_rng(1).integers(3, 512, (5, 100)).astype(np.uint16)
    np.save(tmp_path / "train_prefix.npy", whole[:, :50])
    np.save(tmp_path / "train_suffix.npy", whole[:, 50:])
    np.save(tmp_path / "train_preprefix.npy", whole)  # the benchmark has this, too
    pair = f"{tmp_path / 'train_prefix.npy'}:{tmp_path / 'train_suffix.npy'}"
    for reference in (tmp_path, pair):
        np.testing.assert_array_equal(load(reference, PromptWindow(50, 50)).tokens, whole)
        np.testing.assert_array_equal(load(reference).tokens, whole[:, 42:74])
        np.testing.assert_array_equal(load(reference, PromptWindow(8, 24, offset=5), limit=3).tokens, whole[:3, 47:79])
    with pytest.raises(InputError, match="its prefixes have 50 tokens, fewer than --prefix 60"):
        load(pair, PromptWindow(60, 24))
    np.save(tmp_path / "train_suffix.npy", whole[:4, 50:])
    with pytest.raises(InputError, match="5 prefixes and 4 suffixes"):
        load(pair)


def test_a_saved_data_set_is_read_through_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset(table(duplicates=pa.array([1, 2, 3, 4, 5, 6])))
    saved.save_to_disk(str(tmp_path / "set"))
    found = load(tmp_path / "set")
    np.testing.assert_array_equal(found.tokens, ROWS[:, :32])
    assert found.sequence_id.tolist() == list(range(100, 106))
    assert found.duplicates is not None
    assert found.duplicates.tolist() == [1, 2, 3, 4, 5, 6]
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "splits"))
    np.testing.assert_array_equal(load(tmp_path / "splits" / "train").tokens, ROWS[:, :32])
    with pytest.raises(InputError, match="holds the splits train; give the folder of one"):
        load(tmp_path / "splits")


def test_text_is_tokenized_without_special_tokens(tmp_path, tiny_model):
    tokenizer = hub.open_model(tiny_model()).tokenizer
    text = "Once there was a big fox named Kalo. Kalo found a red ball near the river. " * 2
    tokens = tokenizer.encode(text, add_special_tokens=False)
    opened = []
    file = lines(tmp_path / "set.jsonl", [{"text": text}, {"tokens": tokens}, {"text": text}])
    found = load(file, tokenizer=lambda: opened.append(1) or tokenizer)
    assert found.tokens.tolist() == [tokens[:32]] * 3
    assert opened == [1]


def test_an_offset_skips_and_counts_short_sequences(tmp_path):
    rows = [{"tokens": ROWS[i][:n].tolist(), "duplicates": i} for i, n in enumerate((40, 36, 35, 34, 40))]
    found = load(lines(tmp_path / "set.jsonl", rows), PromptWindow(8, 24, offset=4))
    assert (found.num_skipped, found.sequence_id.tolist()) == (2, [0, 1, 4])
    assert found.duplicates is not None
    assert found.duplicates.tolist() == [0, 1, 4]
    np.testing.assert_array_equal(found.tokens, ROWS[[0, 1, 4], 4:36])
    with pytest.raises(InputError, match="no sequence has 41 tokens"):
        load(tmp_path / "set.jsonl", PromptWindow(8, 24, offset=9))


def test_duplicates_come_from_one_place(tmp_path):
    np.save(tmp_path / "rows.npy", ROWS)
    np.save(tmp_path / "copies.npy", np.arange(6))
    found = load(tmp_path / "rows.npy", duplicates=str(tmp_path / "copies.npy"), limit=4)
    assert found.duplicates is not None
    assert found.duplicates.tolist() == [0, 1, 2, 3]
    np.save(tmp_path / "few.npy", np.arange(5))
    with pytest.raises(InputError, match="one number for each of 6 sequences"):
        load(tmp_path / "rows.npy", duplicates=str(tmp_path / "few.npy"))
    rows = [{"tokens": row.tolist(), "duplicates": 1} for row in ROWS]
    with pytest.raises(InputError, match="has a column `duplicates`"):
        load(lines(tmp_path / "set.jsonl", rows), duplicates=str(tmp_path / "copies.npy"))


def test_duplicates_are_joined_by_index(tmp_path):
    """The files of copies of the Pile are in another order, and hold more sequences."""
    ids = [70, 3, 12, 5, 44, 9]
    pq.write_table(pa.table({"tokens": ROWS.tolist(), "index": ids}), tmp_path / "rows.parquet")
    copies = {i: i % 7 for i in range(99, -1, -1)}
    known = pa.table({"index": list(copies), "duplicates": list(copies.values())})
    pq.write_table(known, tmp_path / "copies.parquet")
    pyarrow.csv.write_csv(known, tmp_path / "copies.csv")
    lines(tmp_path / "copies.jsonl", known.to_pylist())
    for suffix in ("parquet", "csv", "jsonl"):
        found = load(tmp_path / "rows.parquet", duplicates=str(tmp_path / f"copies.{suffix}")).duplicates
        assert found is not None
        assert found.tolist() == [i % 7 for i in ids]
    for content, message in (
        (known.slice(50), "no row for 1 of 6 sequences, such as index 70"),
        (known.slice(0, 0), "no row for 6 of 6"),
        (pa.concat_tables([known, known.slice(0, 2)]), "2 rows repeat an `index`"),
        (known.rename_columns(["index", "count"]), "needs the columns `index` and `duplicates`"),
    ):
        pq.write_table(content, tmp_path / "wrong.parquet")
        with pytest.raises(InputError, match=message):
            load(tmp_path / "rows.parquet", duplicates=str(tmp_path / "wrong.parquet"))
    (tmp_path / "twice.csv").write_text("index,duplicates,index\n3,1,3\n")
    (tmp_path / "copies.tsv").write_text("index\tduplicates\n")
    for name, message in (
        ("gone.csv", "no such file"),
        ("rows.parquet", "needs the columns"),
        ("twice.csv", "two of its columns have one name"),
        ("copies.tsv", "none of .npy, .parquet, .csv and .jsonl"),
    ):
        with pytest.raises(InputError, match=message):
            load(tmp_path / "rows.parquet", duplicates=str(tmp_path / name))


def test_row_numbers_are_not_joined_with_a_table_of_copies(tmp_path):
    """The ids of the Pile's table begin with 0, 1, 2 as the row numbers of any set do."""
    np.save(tmp_path / "rows.npy", ROWS)
    pq.write_table(pa.table({"index": range(9), "duplicates": range(9)}), tmp_path / "copies.parquet")
    with pytest.raises(InputError, match="a table is joined by `index`, which the sequences do not have"):
        load(tmp_path / "rows.npy", duplicates=str(tmp_path / "copies.parquet"))


def test_shards_of_texts_are_joined(tmp_path, tiny_model):
    tokenizer = hub.open_model(tiny_model("llama")).tokenizer
    texts = ["the lamp and the river " * 6, "a stone in the river " * 6]
    for i, (text, dtype) in enumerate(zip(texts, (pa.int32(), pa.int64()), strict=True)):
        table = pa.table({"text": [text], "index": pa.array([i], dtype)})
        pq.write_table(table, tmp_path / f"shard-{i}.parquet")
    found = load(tmp_path, PromptWindow(4, 8), tokenizer=lambda: tokenizer)
    assert found.tokens.tolist() == [tokenizer.encode(text, add_special_tokens=False)[:12] for text in texts]
    assert found.sequence_id.tolist() == [0, 1]


@pytest.mark.parametrize(
    "content", [{"text": "a b"}, {"story": "a b"}, {"tokens": [1]}, {"text": "a", "input_ids": [1]}]
)
def test_a_set_holds_texts_or_ids(tmp_path, content):
    lines(tmp_path / "a.jsonl", [content])
    pq.write_table(pa.table({name: [value] for name, value in content.items()}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert holds_text(str(tmp_path / name)) == (content == {"text": "a b"})
        assert holds_text(str(tmp_path / name), "story") == ("story" in content) if "story" in content else True


def test_a_subsample_is_drawn_by_hash_of_the_id(tmp_path):
    """It does not depend on the order, and a larger subsample holds the smaller."""
    rows = np.random.default_rng(2).integers(3, 512, (2000, 40))
    ids = np.arange(10_000, 12_000)
    pq.write_table(pa.table({"tokens": rows.tolist(), "index": ids}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"tokens": rows[::-1].tolist(), "index": ids[::-1]}), tmp_path / "b.parquet")
    small, large, other = (
        load(tmp_path / name, subsample=n) for name, n in (("a.parquet", 100), ("a.parquet", 300), ("b.parquet", 100))
    )
    chosen = small.sequence_id.tolist()
    expected = sorted(ids.tolist(), key=lambda i: hashlib.sha256(f"subsample {i}".encode()).digest())[:100]
    assert chosen == sorted(expected)
    assert other.sequence_id.tolist() == chosen[::-1]
    assert set(chosen) < set(large.sequence_id.tolist())
    np.testing.assert_array_equal(small.tokens, rows[small.sequence_id - 10_000, :32])
    assert len(load(tmp_path / "a.parquet", subsample=5000).tokens) == 2000


def write_megatron(folder, rows, code=8, dtype="<u2"):
    """Write the bytes that `IndexedDatasetBuilder` of Megatron-LM writes (core_v0.12), one document per sequence."""
    lengths = np.array([len(row) for row in rows], "<i4")
    itemsize = np.dtype(dtype).itemsize
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * itemsize
    documents = np.arange(len(rows) + 1, dtype="<i8")
    header = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    header += struct.pack("<Q", len(rows)) + struct.pack("<Q", len(documents))
    (folder / "pile.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + documents.tobytes())
    (folder / "pile.bin").write_bytes(b"".join(np.array(row, dtype).tobytes() for row in rows))
    return folder / "pile.idx"


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8")])
def test_token_files_of_megatron_are_read(tmp_path, code, dtype):
    rows = [[*row, 7, 8][: 33 + i] for i, row in enumerate(ROWS.tolist())]
    path = write_megatron(tmp_path, rows, code, dtype)
    for name in (path, tmp_path / "pile.bin"):
        np.testing.assert_array_equal(load(name).tokens, ROWS[:, :32])
    np.testing.assert_array_equal(load(path, limit=2).tokens, ROWS[:2, :32])
    alone = sequences_fingerprint(path)
    assert alone == sequences_fingerprint(tmp_path / "pile.bin")
    write_megatron(tmp_path, rows[::-1], code, dtype)
    assert sequences_fingerprint(path) != alone


def test_damaged_token_files_of_megatron_are_named(tmp_path):
    path, data = write_megatron(tmp_path, ROWS.tolist()), tmp_path / "pile.bin"
    index, tokens = path.read_bytes(), data.read_bytes()
    swapped = index[:58] + index[66:74] + index[58:66] + index[74:]  # two pointers
    for content, message in (
        (b"TNTIDX\x00\x00" + index[8:], "is no index"),
        (index[:20], "is no index"),
        (index[:60], "is truncated"),
        (index[:17] + b"\x07" + index[18:], "dtype 7 is not supported"),
        (swapped, "do not follow one another"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            load(path)
    path.write_bytes(index)
    data.write_bytes(tokens[:-1])
    with pytest.raises(InputError, match=r"pile.bin: is shorter than pile.idx says"):
        load(path)
    data.unlink()
    with pytest.raises(InputError, match=r"pile.bin: no such file"):
        load(path)


def test_a_column_is_named(tmp_path, tiny_model):
    tokenizer = hub.open_model(tiny_model("llama")).tokenizer
    texts = ["the lamp and the river " * 6, "a stone in the river " * 6]
    expected = [tokenizer.encode(text, add_special_tokens=False)[:12] for text in texts]
    window, encode = PromptWindow(4, 8), lambda: tokenizer
    pq.write_table(pa.table({"story": texts, "ids": ROWS[:2].tolist()}), tmp_path / "a.parquet")
    lines(tmp_path / "a.jsonl", [{"story": t, "ids": r.tolist()} for t, r in zip(texts, ROWS[:2], strict=True)])
    for name in ("a.parquet", "a.jsonl"):
        assert load(tmp_path / name, window, column="story", tokenizer=encode).tokens.tolist() == expected
        np.testing.assert_array_equal(load(tmp_path / name, column="ids").tokens, ROWS[:2, :32])
        with pytest.raises(InputError, match=r"has no (column|field) `gone`"):
            load(tmp_path / name, column="gone")
    pq.write_table(pa.table({"text": texts}), tmp_path / "b.parquet")
    assert load(tmp_path / "b.parquet", window, tokenizer=encode).tokens.tolist() == expected
    pq.write_table(pa.table({"text": [texts[0], None]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b.parquet: row 1: has no text"):
        load(tmp_path / "b.parquet", window, tokenizer=encode)
    np.save(tmp_path / "rows.npy", ROWS)
    with pytest.raises(InputError, match="has no columns; drop --column ids"):
        load(tmp_path / "rows.npy", column="ids")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"tokens": [3] * 31}, "set.jsonl:1: 31 tokens, fewer"),
        ({"tokens": ["a"] * 32}, "whole numbers"),
        ({"tokens": [2**40] * 32}, "32 bits"),
        ({"tokens": [3] * 32, "index": 1.5}, "`index` must be a whole number"),
        ({"story": "a"}, "has no field `tokens`, `input_ids`, `token_ids` or `text`"),
    ],
)
def test_unusable_lines_are_named(tmp_path, line, message):
    with pytest.raises(InputError, match=message):
        load(lines(tmp_path / "set.jsonl", [line]))


def test_unusable_tables_are_named(tmp_path):
    file = tmp_path / "rows.parquet"
    for content, message in (
        (pa.table({"ids": [1]}), "no column `tokens`"),
        (pa.table({"tokens": ["abc"]}), "not lists of whole numbers"),
        (pa.table({"tokens": [[3] * 32, None]}), "nulls"),
        (pa.table({"tokens": [[3] * 31]}), "31 tokens, fewer"),
        (pa.table({"tokens": [[3] * 32], "index": ["a"]}), "`index` must hold a whole number"),
        (pa.table({"tokens": pa.array([], pa.list_(pa.int64()))}), "no sequences"),
    ):
        pq.write_table(content, file)
        with pytest.raises(InputError, match=message):
            load(file)
    file.write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        load(file)
    lines(tmp_path / "set.jsonl", [{"tokens": [3] * 32, "index": 1}, {"tokens": [3] * 32}])
    with pytest.raises(InputError, match="only 1 of its 2 lines have `index`"):
        load(tmp_path / "set.jsonl")


def test_random_offsets_are_drawn_by_id_from_what_each_length_allows(tmp_path):
    rng = np.random.default_rng(1)
    rows = [rng.integers(3, 512, 32 + 4 * (i % 5)).tolist() for i in range(400)]
    path = lines(tmp_path / "rows.jsonl", [{"tokens": row, "index": i} for i, row in enumerate(rows)])
    found = load(path, PromptWindow(8, 24, random_offset=True))
    spare: dict[int, list[int]] = {}
    for i, tokens in zip(found.sequence_id.tolist(), found.tokens.tolist(), strict=True):
        at = next(begin for begin in range(len(rows[i]) - 31) if rows[i][begin : begin + 32] == tokens)
        spare.setdefault(len(rows[i]) - 32, []).append(at)
    for most, drawn in spare.items():
        assert set(drawn) == set(range(most + 1))
        assert abs(np.mean(drawn) - most / 2) < 0.15 * most + 1e-9
    lines(path, [{"tokens": row, "index": i} for i, row in reversed(list(enumerate(rows)))])
    again = load(path, PromptWindow(8, 24, random_offset=True))
    np.testing.assert_array_equal(again.tokens[::-1], found.tokens)  # by id, not by position
    begun = load(path, PromptWindow(8, 20, 4, random_offset=True))
    assert all(tokens in [rows[i][b : b + 28] for b in range(4, len(rows[i]) - 27)] for i, tokens in zip(
        begun.sequence_id.tolist(), begun.tokens.tolist(), strict=True))  # fmt: skip


def test_h_is_half_of_a_set_in_any_order():
    index = np.arange(4000)
    chosen = held_out_half("a" * 64, index)
    assert abs(chosen.mean() - 0.5) < 0.025  # more than three standard errors
    np.testing.assert_array_equal(held_out_half("a" * 64, index[::-1])[::-1], chosen)
    other = held_out_half("b" * 64, index)
    assert abs((chosen == other).mean() - 0.5) < 0.025
