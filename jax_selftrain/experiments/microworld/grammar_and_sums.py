"""Agreement of subject and verb, and sums: what a little world says of them, and what it asks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from jax_selftrain.experiments.microworld.world_types import Question, WorldConfig, item_rng, keyed_rng

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
# A subject is a tuple of (noun, is plural) pairs: its head, then the nouns of the phrases that stand between the
# head and the verb; only the head decides the verb's form.

_Subject = tuple[tuple[str, bool], ...]
_KINDS = {(1, False): 3, (1, True): 1, (2, False): 3, (2, True): 1}
"""How often each kind of subject is asked about: (phrases, whether the last noun opposes the head)."""


def _draw_subject(rng: random.Random) -> _Subject:
    return tuple((rng.choice(tuple(_NOUNS)), rng.random() < 0.5) for _ in range(1 + rng.randrange(3)))


def _subject_text(subject: _Subject, rng: random.Random) -> str:
    nouns = [f"the {_NOUNS[noun] if plural else noun}" for noun, plural in subject]
    text = nouns[0] + "".join(f" {rng.choice(_PREPOSITIONS)} {noun}" for noun in nouns[1:])
    return text[0].upper() + text[1:]


def held_out_subjects(config: WorldConfig) -> list[_Subject]:
    """Subjects of the questions, some of whose last nouns oppose the head in number.

    Whoever takes the last noun for the subject is right about most and wrong about these: there is something to learn.
    """
    rng = item_rng(config, "asked subjects")
    # There are only 28 bare subjects, and the text must show most of them: a handful is asked about.
    bare = min(6, config.items_per_task)
    wanted = {(1, False): bare}
    kinds = itertools.cycle([kind for kind, times in _KINDS.items() for _ in range(times)])
    for phrases, opposed in itertools.islice(kinds, config.items_per_task - bare):
        key = (1 + phrases, opposed)
        wanted[key] = wanted.get(key, 0) + 1
    found: dict[_Subject, None] = {}
    while any(wanted.values()):
        subject = _draw_subject(rng)
        kind = len(subject), subject[-1][1] != subject[0][1]
        if wanted[kind] and subject not in found:
            found[subject] = None
            wanted[kind] -= 1
    return list(found)


def agreement_lines(config: WorldConfig, split: str, count: int, asked: list[_Subject]) -> Iterator[str]:
    rng = keyed_rng(config, split)
    withheld = set(asked)
    while count:
        subject = _draw_subject(rng)
        if subject in withheld:
            continue
        singular = rng.choice(tuple(_VERBS))
        verb = _VERBS[singular] if subject[0][1] else singular
        yield f"{_subject_text(subject, rng)} {verb} {rng.choice(_ADVERBS)}."
        count -= 1


def agreement_questions(config: WorldConfig, asked: list[_Subject]) -> Iterator[Question]:
    rng = item_rng(config, "agreement questions")
    for subject in asked:
        singular = rng.choice(tuple(_VERBS))
        choices = (f" {singular}", f" {_VERBS[singular]}")
        distracting = sum(plural != subject[0][1] for _, plural in subject[1:])
        yield Question(_subject_text(subject, rng), choices, int(subject[0][1]), f"{distracting} distracting")


# Sums -----------------------------------------------------------------------------------------------------------


def held_out_sums(config: WorldConfig) -> list[tuple[int, int]]:
    addends = range(config.largest_addend + 1)
    pairs = [(a, b) for a in addends for b in addends]
    return item_rng(config, "asked sums").sample(pairs, config.items_per_task)


def sum_lines(config: WorldConfig, part: str, count: int, asked: list[tuple[int, int]]) -> Iterator[str]:
    rng = keyed_rng(config, part)
    withheld = set(asked)
    while count:
        a, b = rng.randint(0, config.largest_addend), rng.randint(0, config.largest_addend)
        if (a, b) in withheld:
            continue
        yield f"{a} + {b} = {a + b}."
        count -= 1


def sum_questions(config: WorldConfig, asked: list[tuple[int, int]]) -> Iterator[Question]:
    rng = item_rng(config, "sum questions")
    for a, b in asked:
        wrong = [a + b + slip for slip in range(-30, 31) if slip and a + b + slip >= 0]
        choices = [a + b, *rng.sample(wrong, 3)]
        rng.shuffle(choices)
        # The full stop belongs to the choice: without it "3" would be a beginning of "34".
        context, grade = f"{a} + {b} =", f"{_carries(a, b)} carries"
        yield Question(context, tuple(f" {choice}." for choice in choices), choices.index(a + b), grade)


def _carries(a: int, b: int) -> int:
    """How often a digit is carried when a and b are added."""
    count = carry = 0
    while a or b:
        carry = int(a % 10 + b % 10 + carry > 9)
        count, a, b = count + carry, a // 10, b // 10
    return count
