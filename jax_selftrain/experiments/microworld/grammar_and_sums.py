"""Subject-verb agreement and sums: lines of text and questions."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from jax_selftrain.experiments.microworld.world_types import ChoiceQuestion, WorldConfig, item_rng, keyed_rng

_NOUNS = {
    "dog": "dogs", "cat": "cats", "bird": "birds", "horse": "horses", "boy": "boys", "girl": "girls",
    "farmer": "farmers", "king": "kings", "teacher": "teachers", "sailor": "sailors", "goat": "goats",
    "child": "children", "woman": "women", "mouse": "mice",
}  # fmt: skip
_VERBS = {
    "runs": "run", "sleeps": "sleep", "sings": "sing", "waits": "wait", "eats": "eat", "dances": "dance",
    "smiles": "smile", "works": "work",
}  # fmt: skip
_PREPOSITIONS = ("near", "behind", "with", "beside")
_ADVERBS = ("today", "again", "slowly", "at night", "in the sun", "all day")

# Agreement ------------------------------------------------------------------------------------------------------

_Subject = tuple[tuple[str, bool], ...]
"""(noun, is plural) of the head, which decides the form of the verb, and of the phrases after it."""
_KINDS = {(1, False): 3, (1, True): 1, (2, False): 3, (2, True): 1}
"""Weights of the kinds of subjects in questions: (phrases, last noun differs in number from the head)."""


def _draw_subject(rng: random.Random) -> _Subject:
    return tuple((rng.choice(tuple(_NOUNS)), rng.random() < 0.5) for _ in range(1 + rng.randrange(3)))


def _subject_text(subject: _Subject, rng: random.Random) -> str:
    nouns = [f"the {_NOUNS[noun] if plural else noun}" for noun, plural in subject]
    text = nouns[0] + "".join(f" {rng.choice(_PREPOSITIONS)} {noun}" for noun in nouns[1:])
    return text[0].upper() + text[1:]


def held_out_subjects(config: WorldConfig) -> list[_Subject]:
    """Return the subjects of the questions.

    In some the last noun differs in number from the head: a model that agrees with the last noun gets these wrong.
    """
    rng = item_rng(config, "asked", "subjects")
    # Most of the 28 subjects without phrases must be in the text.
    bare = min(6, config.items_per_task)
    wanted = {(1, False): bare}
    kinds = itertools.cycle([kind for kind, times in _KINDS.items() for _ in range(times)])
    for phrases, differs in itertools.islice(kinds, config.items_per_task - bare):
        key = (1 + phrases, differs)
        wanted[key] = wanted.get(key, 0) + 1
    found: dict[_Subject, None] = {}
    while any(wanted.values()):
        subject = _draw_subject(rng)
        kind = len(subject), subject[-1][1] != subject[0][1]
        if wanted[kind] and subject not in found:
            found[subject] = None
            wanted[kind] -= 1
    return list(found)


def agreement_lines(config: WorldConfig, split: str, count: int, held_out: list[_Subject]) -> Iterator[str]:
    """Yield sentences with other subjects than the held-out ones."""
    rng = keyed_rng(config, split)
    excluded = set(held_out)
    while count:
        subject = _draw_subject(rng)
        if subject in excluded:
            continue
        singular = rng.choice(tuple(_VERBS))
        verb = _VERBS[singular] if subject[0][1] else singular
        yield f"{_subject_text(subject, rng)} {verb} {rng.choice(_ADVERBS)}."
        count -= 1


def agreement_questions(config: WorldConfig, held_out: list[_Subject]) -> Iterator[ChoiceQuestion]:
    """Yield a question on each held-out subject."""
    rng = item_rng(config, "agreement questions")
    for subject in held_out:
        singular = rng.choice(tuple(_VERBS))
        choices = (f" {singular}", f" {_VERBS[singular]}")
        distracting = sum(plural != subject[0][1] for _, plural in subject[1:])
        yield ChoiceQuestion(_subject_text(subject, rng), choices, int(subject[0][1]), f"{distracting} distracting")


# Sums -----------------------------------------------------------------------------------------------------------


def held_out_sums(config: WorldConfig) -> list[tuple[int, int]]:
    """Return the pairs of the questions."""
    addends = range(config.largest_addend + 1)
    pairs = [(a, b) for a in addends for b in addends]
    return item_rng(config, "asked", "sums").sample(pairs, config.items_per_task)


def sum_lines(config: WorldConfig, split: str, count: int, held_out: list[tuple[int, int]]) -> Iterator[str]:
    """Yield sums of other pairs than the held-out ones."""
    rng = keyed_rng(config, split)
    excluded = set(held_out)
    while count:
        a, b = rng.randint(0, config.largest_addend), rng.randint(0, config.largest_addend)
        if (a, b) in excluded:
            continue
        yield f"{a} + {b} = {a + b}."
        count -= 1


def sum_questions(config: WorldConfig, held_out: list[tuple[int, int]]) -> Iterator[ChoiceQuestion]:
    """Yield a question on each held-out sum."""
    rng = item_rng(config, "sum questions")
    for a, b in held_out:
        wrong = [a + b + slip for slip in range(-30, 31) if slip and a + b + slip >= 0]
        choices = [a + b, *rng.sample(wrong, 3)]
        rng.shuffle(choices)
        # The period belongs to the choice: without it "3" is a prefix of "34".
        context, grade = f"{a} + {b} =", f"{_count_carries(a, b)} carries"
        yield ChoiceQuestion(context, tuple(f" {choice}." for choice in choices), choices.index(a + b), grade)


def _count_carries(a: int, b: int) -> int:
    """Return the number of carries of a + b."""
    count = carry = 0
    while a or b:
        carry = int(a % 10 + b % 10 + carry > 9)
        count, a, b = count + carry, a // 10, b // 10
    return count
