"""Proxies of texts at known extremes, and their order."""

from __future__ import annotations

import numpy as np
import pytest

from jax_selftrain.study.proxies import _compression, similarity

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
    copies, diverse = _compression(["the same words again"] * 50), _compression(texts(0, WORDS, 50))
    assert copies is not None
    assert diverse is not None
    assert copies < 0.1 < diverse
    assert _compression([]) is None
