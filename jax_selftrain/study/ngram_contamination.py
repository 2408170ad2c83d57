"""Which questions of the tasks stand in a corpus: the 13-gram check (GPT-3, appendix C of arXiv:2005.14165).

A question counts as found if 13 words in a row of it, in lower case and without punctuation, stand in one document.
Questions of fewer than 13 words cannot be found that way, and are counted apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

NGRAM_LENGTH = 13

Ngram = tuple[str, ...]


def contaminated_share(texts: Iterable[str], questions: Sequence[str]) -> dict[str, int]:
    """`questions` that are long enough, how many of them are `found` in the texts, and how many are `too_short`."""
    grams = [set(_grams(question)) for question in questions]
    owners: dict[Ngram, list[int]] = {}
    for number, members in enumerate(grams):
        for gram in members:
            owners.setdefault(gram, []).append(number)
    found: set[int] = set()
    for text in texts if owners else ():
        for gram in _grams(text):
            found.update(owners.get(gram, ()))
    long_enough = sum(bool(members) for members in grams)
    return {"questions": long_enough, "found": len(found), "too_short": len(grams) - long_enough}


def _grams(text: str) -> Iterator[Ngram]:
    words = re.findall(r"\w+", text.lower())
    return (tuple(words[at : at + NGRAM_LENGTH]) for at in range(len(words) - NGRAM_LENGTH + 1))
