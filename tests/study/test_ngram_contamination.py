"""Planted overlaps of 12, 13 and 14 words."""

from __future__ import annotations

import numpy as np

from jax_selftrain.study.ngram_contamination import contaminated_share


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
