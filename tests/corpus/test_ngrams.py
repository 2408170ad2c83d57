"""Overlaps are counted exactly: what is found is there, what is there is found, and nothing crosses documents."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_selftrain.corpus import NgramIndex


def index_of(documents) -> NgramIndex:
    flat = np.array([token for document in documents for token in document], np.int32)
    return NgramIndex.build(flat, np.cumsum([0, *map(len, documents)]))


def longest_common_run(query, documents) -> int:
    """By trying every run of the query in every document."""
    grams = {tuple(d[i:j]) for d in documents for i in range(len(d)) for j in range(i + 1, len(d) + 1)}
    runs = [j - i for i in range(len(query)) for j in range(i + 1, len(query) + 1) if tuple(query[i:j]) in grams]
    return max(runs, default=0)


token_lists = st.lists(st.integers(0, 3), max_size=14)


@settings(max_examples=150, deadline=None)
@given(documents=st.lists(token_lists, max_size=6), queries=st.lists(token_lists, max_size=5))
def test_the_longest_overlap_is_that_of_trying_everything(documents, queries):
    found = index_of(documents).longest_overlap([np.array(query, np.int64) for query in queries])
    assert found.tolist() == [longest_common_run(query, documents) for query in queries]


@settings(max_examples=50, deadline=None)
@given(documents=st.lists(token_lists, min_size=1, max_size=6))
def test_places_are_sorted_by_what_follows_in_their_document(documents):
    index = index_of(documents)
    ends = {place: end for end in np.flatnonzero(index.text < 0)[::-1].tolist() for place in range(end)}
    suffixes = [index.text[place : ends[place]].tolist() for place in index.order.tolist()]
    assert suffixes == sorted(suffixes)
    assert len(suffixes) == sum(map(len, documents))


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
    assert index_of(documents).longest_overlap(query[None]).tolist() == [overlap]


def test_an_overlap_is_found_in_any_shard_but_not_across_documents(tmp_path, make_corpus):
    rng = np.random.Generator(np.random.Philox(3))
    secret = rng.integers(1000, 2000, 32)
    documents = [rng.integers(3, 900, 60).tolist() for _ in range(8)]
    documents[3][-15:] = secret[:15].tolist()  # ends a shard …
    documents[4][:17] = secret[15:].tolist()  # … and goes on at the start of the next: 15 and 17, never 32
    corpus = make_corpus(tmp_path / "c", documents, per_shard=4)
    tokens, offsets, _ = corpus.token_arrays()
    index = NgramIndex.build(tokens, offsets)
    assert index.longest_overlap([secret]).tolist() == [17]
    assert index.longest_overlap([secret[:15], secret[:16], secret[15:], secret[14:]]).tolist() == [15, 15, 17, 17]


def test_queries_may_have_any_lengths_and_hold_unknown_tokens():
    index = index_of([[5, 6, 7, 8], [9]])
    queries = [np.array(q, np.int64) for q in ([], [4], [6, 7], [5, 6, 7, 8, 9], [7, 8, 9], [-1, 9, -2], [2**31 - 1])]
    assert index.longest_overlap(queries).tolist() == [0, 0, 2, 4, 2, 1, 0]
    assert index.longest_overlap(np.empty((0, 32), np.int32)).shape == (0,)


def test_repetitive_text_is_handled():
    index = index_of([[1] * 5000, [1] * 300 + [2], []])
    queries = [np.array([1] * n + tail) for n, tail in ((7, []), (5001, []), (301, [2]), (3, [2, 1]))]
    assert index.longest_overlap(queries).tolist() == [7, 5000, 301, 4]


def test_many_queries_over_many_tokens_agree_with_one_at_a_time():
    rng = np.random.Generator(np.random.Philox(11))
    tokens = (rng.integers(0, 1000, 300_000) ** 2 // 5000).astype(np.int32)  # skewed, as words are
    offsets = np.append(np.arange(0, 300_000, 700), 300_000)
    index = NgramIndex.build(tokens, offsets)
    queries = np.stack([tokens[at : at + 32] for at in rng.integers(0, 299_000, 10_000)])  # > one block of queries
    found = index.longest_overlap(queries)
    assert found.min() >= 16  # a window of 32 that spans two documents has 16 or more in one of them
    for row in rng.integers(0, len(queries), 20):
        assert index.longest_overlap(queries[row : row + 1])[0] == found[row]


def test_negative_token_ids_cannot_be_indexed():
    with pytest.raises(ValueError, match="negative"):
        index_of([[1, -1]])
