"""Contamination of a corpus by task questions: the 13-gram check.

The check of GPT-3 (appendix C of arXiv:2005.14165). A question is found if 13 consecutive words of it, in lower case
and without punctuation, occur in one document. Shorter questions cannot be found and are counted separately.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

NGRAM_LENGTH = 13

Ngram = tuple[str, ...]


def contaminated_share(texts: Iterable[str], questions: Sequence[str]) -> dict[str, int]:
    """Count `questions` of 13 words or more, those `found`, those `too_short`."""
    grams = [set(_ngrams(question)) for question in questions]
    owners: dict[Ngram, list[int]] = {}
    for number, members in enumerate(grams):
        for gram in members:
            owners.setdefault(gram, []).append(number)
    found: set[int] = set()
    for text in texts if owners else ():
        for gram in _ngrams(text):
            found.update(owners.get(gram, ()))
    long_enough = sum(bool(members) for members in grams)
    return {"questions": long_enough, "found": len(found), "too_short": len(grams) - long_enough}


def _ngrams(text: str) -> Iterator[Ngram]:
    words = re.findall(r"\w+", text.lower())
    return (tuple(words[i : i + NGRAM_LENGTH]) for i in range(len(words) - NGRAM_LENGTH + 1))
