"""Packed rows predict every token of the corpus exactly once."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from corpus_factory import batch_indices, pack_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_selftrain.corpus import PackedRows, build_packed_rows
from jax_selftrain.errors import InputError

START = 1
PACKINGS = ("masked", "packed", "single")

# Few ids, so that documents often end with the start id (as Pythia's do: its BOS is its EOS).
corpora = st.lists(st.lists(st.integers(0, 3), max_size=17), min_size=1, max_size=14).filter(any)
seq_lens = st.integers(1, 12)


# ---------------------------------------------------------------- the plain-Python reference


def split_documents(documents, seq_len):
    """Return the expected segments: a first input and at most `seq_len` targets."""
    for document in documents:
        whole = [START, *document]
        for begin in range(0, len(document), seq_len):
            yield whole[begin : begin + seq_len + 1]


def best_fit_decreasing(sizes, capacity):
    """Return the free slots of rows after best-fit decreasing."""
    rows: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, free in enumerate(rows) if free >= size]
        if fitting:
            rows[min(fitting, key=lambda i: rows[i])] -= size
        else:
            rows.append(capacity - size)
    return rows


def packed_rows(documents, seq_len):
    """(tokens, segments, positions, weights) of the one-stream packing as nested lists."""
    stream: list[int] = []
    weights: list[float] = []
    for document in filter(None, documents):
        if not stream or stream[-1] != START:
            stream, weights = [*stream, START], [*weights, 0.0]
        stream, weights = stream + document, weights + [1.0] * len(document)
    rows = []
    for begin in range(0, len(stream) - 1, seq_len):
        window, weight = stream[begin : begin + seq_len + 1], weights[begin + 1 : begin + seq_len + 1]
        inputs = min(len(window), seq_len)
        rows.append(
            (
                window + [0] * (seq_len + 1 - len(window)),
                [1] * inputs + [0] * (seq_len - inputs),
                [*range(inputs)] + [0] * (seq_len - inputs),
                weight + [0.0] * (seq_len - len(weight)),
            )
        )
    return rows


def find_segments(rows: PackedRows):
    """Return [(row, first slot, tokens)] of the segments, after checks."""
    found = []
    for r in range(len(rows)):
        segments, seq_len = rows.segments[r].tolist(), rows.segments.shape[1]
        assert segments == sorted(s for s in segments if s) + [0] * segments.count(0)
        assert set(segments) - {0} == set(range(1, max(segments) + 1))
        for segment in range(1, max(segments) + 1):
            slots = [t for t in range(seq_len) if segments[t] == segment]
            assert rows.positions[r, slots].tolist() == list(range(len(slots)))
            weights = rows.weights[r, slots].tolist()
            # Only the last input of a segment may have nothing to predict, and at the end of a row it may be cut off.
            assert weights[:-1] == [1.0] * (len(slots) - 1)
            last = slots[-1] + int(weights[-1])
            found.append((r, slots[0], rows.tokens[r, slots[0] : last + 1].tolist()))
        padding = [t for t in range(seq_len) if segments[t] == 0]
        assert not rows.weights[r, padding].any()
        assert not rows.positions[r, padding].any()
    return found


def check_types(rows: PackedRows, seq_len: int):
    n = len(rows)
    assert (rows.tokens.shape, rows.tokens.dtype) == ((n, seq_len + 1), np.int32)
    assert (rows.segments.shape, rows.segments.dtype) == ((n, seq_len), np.int32)
    assert (rows.positions.shape, rows.positions.dtype) == ((n, seq_len), np.int32)
    assert (rows.weights.shape, rows.weights.dtype) == ((n, seq_len), np.float32)


def check_statistics(rows: PackedRows, documents, seq_len):
    assert rows.statistics["rows"] == len(rows)
    assert rows.statistics["seq_len"] == seq_len
    assert rows.statistics["documents"] == sum(1 for d in documents if d)
    assert rows.statistics["long_documents"] == sum(len(d) > seq_len for d in documents)
    assert rows.statistics["tokens"] == rows.weights.sum() == sum(map(len, documents))
    assert rows.statistics["padding_share"] == pytest.approx((rows.segments == 0).mean(), abs=1e-12)  # one division


# ---------------------------------------------------------------- what each packing promises


@settings(max_examples=60)
@given(documents=corpora, seq_len=seq_lens)
def test_masked_predicts_every_token_once_in_whole_documents_wherever_they_fit(make_corpus, documents, seq_len):
    with tempfile.TemporaryDirectory() as folder:
        rows = pack_corpus(make_corpus(Path(folder), documents), seq_len, "masked")
    check_types(rows, seq_len)
    check_statistics(rows, documents, seq_len)
    expected = list(split_documents(documents, seq_len))
    found = find_segments(rows)
    assert Counter(tuple(tokens) for _, _, tokens in found) == Counter(map(tuple, expected))
    free = best_fit_decreasing(map(len, expected), seq_len + 1)
    used: Counter[int] = Counter()
    for row, _, tokens in found:
        used[row] += len(tokens)
    assert sorted(seq_len + 1 - size for size in used.values()) == sorted(free)


@settings(max_examples=60)
@given(documents=corpora, seq_len=seq_lens)
def test_packed_is_one_stream_with_single_start_ids_between_documents(make_corpus, documents, seq_len):
    with tempfile.TemporaryDirectory() as folder:
        rows = pack_corpus(make_corpus(Path(folder), documents), seq_len, "packed")
    check_types(rows, seq_len)
    check_statistics(rows, documents, seq_len)
    found = zip(*(a.tolist() for a in (rows.tokens, rows.segments, rows.positions, rows.weights)), strict=True)
    assert list(found) == packed_rows(documents, seq_len)


@settings(max_examples=40)
@given(documents=corpora, seq_len=seq_lens)
def test_single_gives_every_document_its_own_row_in_order(make_corpus, documents, seq_len):
    with tempfile.TemporaryDirectory() as folder:
        rows = pack_corpus(make_corpus(Path(folder), documents), seq_len, "single")
    check_types(rows, seq_len)
    check_statistics(rows, documents, seq_len)
    found = find_segments(rows)
    assert [(row, place) for row, place, _ in found] == [(row, 0) for row in range(len(rows))]
    assert [tokens for _, _, tokens in found] == list(split_documents(documents, seq_len))


@settings(max_examples=30)
@given(documents=corpora, seq_len=seq_lens, packing=st.sampled_from(PACKINGS))
def test_rows_made_in_small_blocks_are_the_same(make_corpus, documents, seq_len, packing):
    from jax_selftrain.corpus import packing as module

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        corpus = make_corpus(Path(folder), documents)
        whole = pack_corpus(corpus, seq_len, packing)
        patch.setattr(module, "_BLOCK_TOKENS", 2 * seq_len)
        blocks = pack_corpus(corpus, seq_len, packing)
    for name in ("tokens", "segments", "positions", "weights"):
        np.testing.assert_array_equal(getattr(blocks, name), getattr(whole, name))


def test_rows_follow_the_documents_that_open_them(tmp_path, make_corpus):
    documents = [[10] * 2, [11] * 5, [12] * 7, [13] * 4, [14] * 1]
    rows = pack_corpus(make_corpus(tmp_path, documents), 8, "masked")
    # 9 slots a row; sizes 3, 6, 8, 5, 2: longest first 8 | 6 | 5 opens a third, 3 fills the 6, 2 goes to the 5.
    assert [r[r > 1].tolist() for r in rows.tokens] == [[10] * 2 + [11] * 5, [12] * 7, [13] * 4 + [14]]


def test_a_document_ended_by_length_gets_no_stop_id(tmp_path, make_corpus):
    rows = pack_corpus(make_corpus(tmp_path, [[5, 6, 7], [8, 9, 2]]), 9, "packed")
    assert rows.tokens.tolist() == [[START, 5, 6, 7, START, 8, 9, 2, 0, 0]]
    assert rows.weights.tolist() == [[1, 1, 1, 0, 1, 1, 1, 0, 0]]  # nothing teaches that 7 is followed by an end


def test_best_fit_wastes_little_on_documents_of_natural_lengths(tmp_path, make_corpus):
    rng = np.random.Generator(np.random.Philox(5))
    lengths = np.clip(rng.lognormal(4.2, 0.6, 2000), 1, 400).astype(int)
    documents = [[7] * length for length in lengths]
    rows = pack_corpus(make_corpus(tmp_path, documents, per_shard=500), 256, "masked")
    slots = sum(len(piece) for piece in split_documents(documents, 256))
    assert len(rows) <= 1.01 * slots / 257  # no arrangement can do with fewer rows than slots / 257


@pytest.mark.parametrize(
    ("documents", "seq_len", "packing", "message"),
    [
        ([[3]], 0, "masked", "at least one loss position"),
        ([[3]], 4, "tight", "choose masked, packed or single"),
        ([[], []], 4, "masked", "no document has a token"),
    ],
)
def test_impossible_rows_are_refused(tmp_path, make_corpus, documents, seq_len, packing, message):
    with pytest.raises(InputError, match=message):
        build_packed_rows(make_corpus(tmp_path / "c", documents), tmp_path / "rows", seq_len, packing)
    assert not (tmp_path / "rows").exists()


# ---------------------------------------------------------------- rows on disk


@pytest.mark.parametrize("packing", PACKINGS)
def test_built_rows_are_the_packed_ones_memory_mapped(tmp_path, make_corpus, documents, packing):
    corpus = make_corpus(tmp_path / "c", documents)
    built, packed = build_packed_rows(corpus, tmp_path / "rows", 16, packing), pack_corpus(corpus, 16, packing)
    for name in ("tokens", "segments", "positions", "weights"):
        assert isinstance(getattr(built, name), np.memmap)
        np.testing.assert_array_equal(getattr(built, name), getattr(packed, name))
        assert getattr(built, name).dtype == getattr(packed, name).dtype
    assert built.statistics == packed.statistics


def test_rows_are_built_once_and_again_only_when_foreign_or_damaged(tmp_path, make_corpus, documents):
    corpus = make_corpus(tmp_path / "c", documents)
    folder = tmp_path / "rows"

    def stamp():
        return (folder / "rows.json").stat().st_ino

    build_packed_rows(corpus, folder, 16, "masked")
    first = stamp()
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    build_packed_rows(corpus, folder, 16, "masked")
    assert stamp() == first

    (folder / "weights.npy").write_bytes(expected["weights.npy"][:-4] + b"\1\1\1\1")
    build_packed_rows(corpus, folder, 16, "masked")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected

    (folder / "rows.json").write_text("{")
    build_packed_rows(corpus, folder, 16, "masked")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected

    other = make_corpus(tmp_path / "d", documents[::-1])
    np.testing.assert_array_equal(
        build_packed_rows(other, folder, 16, "masked").tokens, pack_corpus(other, 16, "masked").tokens
    )
    assert build_packed_rows(other, folder, 8, "masked").tokens.shape[1] == 9
    assert build_packed_rows(other, folder, 8, "single").statistics["packing"] == "single"


def test_on_a_full_disk_no_rows_are_left(tmp_path, make_corpus, full_disk):
    corpus = make_corpus(tmp_path / "c", [[5] * 100] * 100)
    with pytest.raises(InputError, match="rows: cannot be written"):
        build_packed_rows(corpus, tmp_path / "rows", 1000, "single")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


# ---------------------------------------------------------------- batches


@settings(max_examples=80)
@given(n_rows=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 2**64 - 1))
def test_each_epoch_visits_every_row_once(n_rows, batch_size, seed):
    epochs = 4
    stream = [batch_indices(n_rows, batch_size, seed, n) for n in range(-(-epochs * n_rows // batch_size))]
    assert {batch.shape for batch in stream} == {(batch_size,)}
    flat = np.concatenate(stream)[: epochs * n_rows].reshape(epochs, n_rows)
    np.testing.assert_array_equal(np.sort(flat, axis=1), np.tile(np.arange(n_rows), (epochs, 1)))


def test_a_batch_depends_on_nothing_but_its_arguments():
    batches = [batch_indices(100, 7, 3, n) for n in range(60)]
    for n in np.random.default_rng(0).permutation(60):
        np.testing.assert_array_equal(batch_indices(100, 7, 3, int(n)), batches[n])


def test_batches_are_cut_from_one_sequence_whatever_their_size():
    by_7 = np.concatenate([batch_indices(50, 7, 3, n) for n in range(20)])
    by_10 = np.concatenate([batch_indices(50, 10, 3, n) for n in range(14)])
    np.testing.assert_array_equal(by_7, by_10)


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(batch_indices(50, 50, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_order_is_the_same_in_every_version():
    """Pinned: resuming a run after an upgrade must not reorder its rows."""
    assert batch_indices(10, 10, 0, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
