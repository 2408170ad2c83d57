"""Overlaps are exact and do not cross documents."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_selftrain.corpus import RaggedTokens, longest_overlaps, memmap_tokens, overlap
from jax_selftrain.corpus.suffix_array import DOC_END, SuffixArray


def overlaps(queries, documents, shortest=1) -> overlap.Overlaps:
    return longest_overlaps(RaggedTokens.from_list(queries), RaggedTokens.from_list(documents), min_length=shortest)


def runs_in(query, documents) -> list[int]:
    """Find the longest run from each query position by brute force."""
    grams = {tuple(d[i:j]) for d in documents for i in range(len(d)) for j in range(i + 1, len(d) + 1)}
    return [
        max((j - i for j in range(i + 1, len(query) + 1) if tuple(query[i:j]) in grams), default=0)
        for i in range(len(query))
    ]


def check_against_trying_everything(queries, documents, shortest, found) -> None:
    for row, query in enumerate(queries):
        runs = [run if run >= shortest else 0 for run in runs_in(query, documents)]
        longest = max(runs, default=0)
        covered = {at for begin, run in enumerate(runs) for at in range(begin, begin + run)}
        assert found.length[row] == longest
        assert found.covered[row] == len(covered)
        begin, document, place = (int(part[row]) for part in (found.query_start, found.text_doc, found.text_start))
        if longest:
            assert query[begin : begin + longest] == documents[document][place : place + longest]
        else:
            assert (begin, document, place) == (-1, -1, -1)


# Three letters and runs of one: everything repeats, nearly every place of the text matches many of the queries'.
token_lists = st.one_of(
    st.lists(st.integers(0, 2), max_size=14),
    st.builds(lambda token, n, tail: [token] * n + tail, st.integers(0, 1), st.integers(0, 9), st.just([2, 0])),
)


@settings(max_examples=200)
@given(
    documents=st.lists(token_lists, max_size=6),
    queries=st.lists(token_lists, max_size=5),
    shortest=st.integers(1, 6),
    piece=st.sampled_from([1, 3, 5, 1000]),
    block=st.sampled_from([1, 7, 1000]),
)
def test_overlaps_are_those_of_trying_everything(documents, queries, shortest, piece, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "CHUNK_TOKENS", piece)  # long documents are cut, and several passes are made
        patch.setattr(overlap, "QUERY_BLOCK", block)
        found = overlaps(queries, documents, shortest)
    check_against_trying_everything(queries, documents, shortest, found)


@settings(max_examples=50)
@given(documents=st.lists(token_lists, min_size=1, max_size=6))
def test_suffixes_are_sorted_by_what_follows_in_their_document(documents):
    index = SuffixArray.build(np.concatenate([np.array([*d, DOC_END], np.int32) for d in documents]))
    ends = {place: end for end in np.flatnonzero(index.text < 0)[::-1].tolist() for place in range(end)}
    suffixes = [index.text[place : ends[place]].tolist() for place in index.suffixes.tolist()]
    assert suffixes == sorted(suffixes)
    assert len(suffixes) == sum(map(len, documents))
    shared = index.lcp_array().tolist()
    for before, after, n in zip(suffixes, suffixes[1:], shared[1:], strict=False):
        assert before[:n] == after[:n]
        assert before[n : n + 1] != after[n : n + 1] or not before[n:]


@pytest.mark.parametrize("overlap", [15, 16, 17])
@pytest.mark.parametrize("place", ["start", "middle", "end", "whole document"])
def test_planted_overlaps_have_their_exact_length(overlap, place):
    rng = np.random.Generator(np.random.Philox(overlap))
    documents = [rng.integers(0, 10_000, 300).tolist() for _ in range(50)]
    query = rng.integers(10_000, 20_000, 32)  # shares no token with the documents but what is planted
    planted = query[9 : 9 + overlap].tolist()
    host = documents[17]
    at = {"start": 0, "middle": 140, "end": len(host) - overlap, "whole document": 0}[place]
    documents[17] = planted if place == "whole document" else host[:at] + planted + host[at + overlap :]
    for shortest in (1, 8, 15):
        found = overlaps(query[None], documents, shortest)
        assert (found.length[0], found.query_start[0], found.covered[0]) == (overlap, 9, overlap)
        assert (found.text_doc[0], found.text_start[0]) == (17, at)
    assert overlaps(query[None], documents, overlap + 1).length.tolist() == [0]


def test_an_overlap_is_found_in_any_shard_but_not_across_documents(tmp_path, make_corpus):
    rng = np.random.Generator(np.random.Philox(3))
    secret = rng.integers(1000, 2000, 32)
    documents = [rng.integers(3, 900, 60).tolist() for _ in range(8)]
    documents[3][-15:] = secret[:15].tolist()  # ends a shard …
    documents[4][:17] = secret[15:].tolist()  # … and continues at the start of the next: 15 and 17, never 32
    corpus = make_corpus(tmp_path / "c", documents, per_shard=4)
    found = longest_overlaps(RaggedTokens.from_list([secret]), corpus, min_length=8)
    assert (found.length[0], found.text_doc[0], found.text_start[0], found.covered[0]) == (17, 4, 0, 32)
    queries = RaggedTokens.from_list([secret[:15], secret[:16], secret[15:], secret[14:]])
    assert longest_overlaps(queries, corpus, min_length=8).length.tolist() == [15, 15, 17, 17]


def test_queries_may_have_any_lengths():
    queries = [[], [4], [6, 7], [5, 6, 7, 8, 9], [7, 8, 9], [1, 9, 1], [2**31 - 1]]
    assert overlaps(queries, [[5, 6, 7, 8], [9]]).length.tolist() == [0, 0, 2, 4, 2, 1, 0]
    assert overlaps([], [[1]]).length.shape == (0,)
    assert overlaps([[]], [[1]]).length.tolist() == [0]
    assert overlaps([[1]], []).length.tolist() == [0]


def test_repetitive_text_is_handled():
    queries = [[1] * n + tail for n, tail in ((7, []), (5001, []), (301, [2]), (3, [2, 1]))]
    documents = [[1] * 5000, [1] * 300 + [2], []]
    assert overlaps(queries, documents).length.tolist() == [7, 5000, 301, 4]
    assert overlaps(queries, documents, 50).length.tolist() == [0, 5000, 301, 0]


@pytest.mark.parametrize("shortest", [8, 16, 32, 50])
def test_a_document_larger_than_a_piece_hides_nothing(shortest, tmp_path):
    """A memory-mapped document of five chunks has an overlap across each boundary."""
    rng = np.random.Generator(np.random.Philox(5))
    tokens = rng.integers(0, 50_000, 5 * overlap.CHUNK_TOKENS).astype(np.int32)
    queries = rng.integers(0, 50_000, (8, 64)).astype(np.int32)
    for row, length in enumerate((50, 51, 63, 64)):
        at = overlap.CHUNK_TOKENS * (row + 1) - 10 * (row + 1)
        tokens[at : at + length] = queries[row, 64 - length :]
    mapped = memmap_tokens(RaggedTokens.from_list([tokens]), tmp_path)
    assert isinstance(mapped.tokens, np.memmap)
    found = longest_overlaps(RaggedTokens.from_list(queries), mapped, min_length=shortest)
    assert found.length.tolist() == [50, 51, 63, 64, 0, 0, 0, 0]
    positions = [overlap.CHUNK_TOKENS * (row + 1) - 10 * (row + 1) for row in range(4)]
    assert found.text_start.tolist() == [*positions, -1, -1, -1, -1]


def test_many_queries_over_many_tokens_agree_with_one_at_a_time():
    rng = np.random.Generator(np.random.Philox(11))
    tokens = (rng.integers(0, 1000, 300_000) ** 2 // 5000).astype(np.int32)  # skewed, as words are
    text = RaggedTokens(tokens, np.append(np.arange(0, 300_000, 700), 300_000))
    queries = np.stack([tokens[at : at + 32] for at in rng.integers(0, 299_000, 10_000)])
    found = longest_overlaps(RaggedTokens.from_list(queries), text, min_length=4)
    assert found.length.min() >= 16  # a window of 32 that spans two documents has 16 or more in one of them
    assert (found.covered == 32).mean() > 0.9
    for row in rng.integers(0, len(queries), 20):
        alone = longest_overlaps(RaggedTokens.from_list(queries[row : row + 1]), text, min_length=4)
        assert (alone.length[0], alone.covered[0]) == (found.length[row], found.covered[row])


@pytest.mark.parametrize("where", ["queries", "text"])
def test_token_ids_that_cannot_be_are_refused(where):
    sides = {"queries": [[1]], "text": [[1]]} | {where: [[1, -1]]}
    with pytest.raises(ValueError, match="negative"):
        overlaps(sides["queries"], sides["text"])
    with pytest.raises(ValueError, match="min_length must be at least 1"):
        overlaps([[1]], [[1]], 0)
