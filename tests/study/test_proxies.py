"""Proxies of texts at known extremes, and planted overlaps of 12, 13 and 14 words."""

from __future__ import annotations

import numpy as np
import pytest

from jax_selftrain.study.proxies import compression, contaminated_share, similarity

WORDS = [f"w{number}" for number in range(400)]


def texts(seed: int, words: list[str], count: int = 12) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, 20)) for _ in range(count)]


def test_similarity_is_one_for_the_same_texts_and_zero_without_a_common_word() -> None:
    corpus = texts(0, WORDS[:200])
    assert similarity(corpus, corpus) == pytest.approx(1.0)
    assert similarity(corpus, texts(1, WORDS[200:])) == 0.0
    near, far = similarity(corpus, texts(2, WORDS[:200])), similarity(corpus, texts(3, WORDS[100:300]))
    assert near is not None
    assert far is not None
    assert 0 < far < near < 1
    assert similarity(corpus, []) is None
    assert similarity(["  "], corpus) is None


def test_repetition_compresses() -> None:
    copies, diverse = compression(["the same words again"] * 50), compression(texts(0, WORDS, 50))
    assert copies is not None
    assert diverse is not None
    assert copies < 0.1 < diverse
    assert compression([]) is None


def test_thirteen_consecutive_words_are_found_and_twelve_are_not() -> None:
    rng = np.random.default_rng(0)
    words = [f"w{n}" for n in range(5000)]

    def passage(n: int) -> list[str]:
        return [words[i] for i in rng.integers(0, len(words), n)]

    questions, texts = [], []
    for shared in (12, 13, 14, 0):
        for _ in range(5):
            question = passage(30)
            at = int(rng.integers(0, 30 - shared + 1))
            questions.append(" ".join(question))
            texts.append(" ".join([*passage(40), *question[at : at + shared], *passage(40)]))
    questions.append("Far too short to be found.")
    assert contaminated_share(texts, questions) == {"questions": 20, "found": 10, "too_short": 1}


def test_case_and_punctuation_are_ignored_and_a_match_is_within_one_document() -> None:
    question = "The quick brown fox jumps over the lazy dog, and then it sleeps a while."
    assert (
        contaminated_share(["... the quick brown fox Jumps over the LAZY dog and then it; sleeps"], [question])["found"]
        == 1
    )
    halves = question[:30], question[30:]
    assert contaminated_share(halves, [question]) == {"questions": 1, "found": 0, "too_short": 0}
    assert contaminated_share(["anything"], []) == {"questions": 0, "found": 0, "too_short": 0}
