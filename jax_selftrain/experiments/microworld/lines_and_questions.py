"""Facts, agreement and sums of a micro-world, as lines and questions."""

import itertools
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

Placement = Literal["start", "inside"]

SYLLABLES = tuple(onset + vowel for onset, vowel in itertools.product("bdfgklmnprstvz", "aeiou"))
"""Parts of names and nonsense words."""


@dataclass(frozen=True)
class WorldConfig:
    """Size of a world, and the repetitions of its facts and probes."""

    seed: int = 0
    """Seed of the whole world."""
    items_seed: int | None = None
    """Seed of the questions on agreement and sums; unset: `seed`."""
    two_hop: bool = False
    """Give people friends, with questions about the friend's facts."""
    people: int = 130
    """Number of people; each has a home, a job, a pet and a meal."""
    fact_exposures: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Repetitions of facts in the text, in equal shares."""
    probe_copies: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """Repetitions of probes in the text, in equal shares."""
    probes_per_level: int = 16
    """Probes, and counterfactual probes, for each number of copies."""
    probe_words: int = 11
    """Nonsense words in one probe."""
    agreement_lines: int = 5_000
    """Sentences on subject-verb agreement in the text."""
    sum_lines: int = 20_000
    """Sums in the text."""
    largest_addend: int = 39
    """Sums add two numbers from 0 to this one."""
    items_per_task: int = 500
    """Questions on agreement and on sums (one question for each fact)."""
    heldout_documents: int = 300
    """Held-out documents of the same kinds."""


@dataclass(frozen=True)
class Fact:
    """One person's home, job, pet or meal, and its exposures."""

    who: str
    relation: str
    value: str
    exposures: int
    """Number of lines of the text that state it."""


@dataclass(frozen=True)
class Probe:
    """A nonsense passage, its repetitions, placement and counterfactual."""

    text: str
    counterfactual: str
    """A passage of the same distribution outside the text."""
    repetitions: int
    placement: Placement


@dataclass(frozen=True)
class ChoiceQuestion:
    """A multiple-choice item; context and choice are concatenated."""

    context: str
    choices: tuple[str, ...]
    answer: int
    grade: str = ""
    """Difficulty: exposures of a fact, distracting nouns, carries of a sum."""
    cluster: str | None = None
    """The person of the question: questions about one person are not independent."""


@dataclass(frozen=True)
class World:
    """Everything that one `WorldConfig` generates."""

    documents: tuple[str, ...]
    heldout: tuple[str, ...]
    extra_text: tuple[str, ...]
    """More text of the same size: the same facts, other sentences and sums, no probes."""
    facts: tuple[Fact, ...]
    probes: tuple[Probe, ...]
    tasks: dict[str, tuple[ChoiceQuestion, ...]]


def keyed_rng(config: WorldConfig, *key: str) -> random.Random:
    """Return the random stream of a part of the world."""
    return random.Random(f"jax_selftrain world {config.seed} {' '.join(key)}")


def item_rng(config: WorldConfig, *key: str) -> random.Random:
    """Return a random stream that worlds with the same `items_seed` share."""
    seed = config.seed if config.items_seed is None else config.items_seed
    return random.Random(f"jax_selftrain world {seed} {' '.join(key)}")


# Facts ----------------------------------------------------------------------------------------------------------

_RELATIONS = {
    "home": ("{who} lives in", "{who} went back to"),
    "job": ("{who} works as a", "{who} is known as a"),
    "pet": ("{who} keeps a", "{who} walks out with a"),
    "meal": ("{who} likes to eat", "{who} always cooks"),
}
_FRIEND = "friend"
_FRIENDSHIP = ("{who} is a friend of", "{who} often meets")
_VALUES = {
    "job": ("baker", "smith", "painter", "nurse", "judge", "miller", "weaver", "pilot", "clerk", "diver", "guard",
            "barber"),
    "pet": ("parrot", "rabbit", "hamster", "turtle", "falcon", "lizard", "donkey", "pigeon", "beetle", "spider",
            "ferret", "monkey"),
    "meal": ("soup", "bread", "rice", "cheese", "beans", "plums", "cake", "pears", "honey", "eggs", "nuts", "corn"),
}  # fmt: skip


def draw_facts(config: WorldConfig) -> list[Fact]:
    """Draw all facts of a world."""
    rng = keyed_rng(config, "facts")
    names = _invent_names(rng, config.people, 2, ending=("n", "l", "s", "r"))
    towns = _invent_names(rng, 12, 3, ending=("",), avoid=names)
    values = {"home": tuple(towns), **_VALUES}
    pairs = [(who, relation) for who in names for relation in _RELATIONS]
    rng.shuffle(pairs)
    levels = itertools.cycle(config.fact_exposures)
    facts = [Fact(who, relation, rng.choice(values[relation]), next(levels)) for who, relation in pairs]
    if config.two_hop:
        # A ring in random order: each person has one friend.
        ring = keyed_rng(config, "friends").sample(names, len(names))
        often = max(config.fact_exposures)
        facts += [Fact(who, _FRIEND, friend, often) for who, friend in zip(ring, [*ring[1:], ring[0]], strict=True)]
    return facts


def _two_hops(facts: list[Fact], *, held_out: bool) -> Iterator[tuple[str, Fact]]:
    """Yield (person, fact about the friend) of one split."""
    of = {(fact.who, fact.relation): fact for fact in facts}
    friends = [fact for fact in facts if fact.relation == _FRIEND]
    for number, friendship in enumerate(friends):
        if (number % 4 != 0) is held_out:  # three of four people
            for relation in _RELATIONS:
                yield friendship.who, of[friendship.value, relation]


def _two_hop_context(who: str, fact: Fact) -> str:
    return _RELATIONS[fact.relation][0].format(who=f"The friend of {who}")


def two_hop_lines(config: WorldConfig, facts: list[Fact]) -> list[str]:
    """Return the two-hop facts that the text contains."""
    lines = [f"{_two_hop_context(who, fact)} {fact.value}." for who, fact in _two_hops(facts, held_out=False)]
    return lines * max(1, max(config.fact_exposures) // 4)


def two_hop_questions(config: WorldConfig, facts: list[Fact]) -> Iterator[ChoiceQuestion]:
    """Yield questions on the held-out two-hop facts."""
    rng = keyed_rng(config, "two-hop questions")
    values = _list_values(facts)
    for who, fact in _two_hops(facts, held_out=True):
        yield _question(rng, _two_hop_context(who, fact), fact, values, who)


def _invent_names(
    rng: random.Random, count: int, syllables: int, ending: tuple[str, ...], avoid: Collection[str] = ()
) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        word = "".join(rng.choice(SYLLABLES) for _ in range(syllables)) + rng.choice(ending)
        if word.capitalize() not in avoid:
            found[word.capitalize()] = None
    return list(found)


def fact_line(fact: Fact, template: int) -> str:
    """Return a fact as a sentence."""
    forms = _FRIENDSHIP if fact.relation == _FRIEND else _RELATIONS[fact.relation]
    return f"{forms[template % len(forms)].format(who=fact.who)} {fact.value}."


def fact_lines(fact: Fact) -> Iterator[str]:
    """Yield all lines of a fact."""
    # The first template is that of the questions, so that a fact with one line has it too.
    return (fact_line(fact, form) for form in range(fact.exposures))


def fact_questions(config: WorldConfig, facts: list[Fact]) -> Iterator[ChoiceQuestion]:
    """Yield a question on each fact."""
    rng = keyed_rng(config, "fact questions")
    values = _list_values(facts)
    for fact in facts:
        if fact.relation != _FRIEND:
            yield _question(rng, _RELATIONS[fact.relation][0].format(who=fact.who), fact, values, fact.who)


def _list_values(facts: list[Fact]) -> dict[str, list[str]]:
    return {relation: sorted({fact.value for fact in facts if fact.relation == relation}) for relation in _RELATIONS}


def _question(
    rng: random.Random, context: str, fact: Fact, values: dict[str, list[str]], cluster: str
) -> ChoiceQuestion:
    """Return a question with the values of others as wrong choices."""
    others = rng.sample([value for value in values[fact.relation] if value != fact.value], 3)
    choices = [fact.value, *others]
    rng.shuffle(choices)
    grade = f"shown {fact.exposures}×"
    return ChoiceQuestion(context, tuple(f" {choice}" for choice in choices), choices.index(fact.value), grade, cluster)


# Agreement ------------------------------------------------------------------------------------------------------

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
        if subject not in excluded:
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
        if (a, b) not in excluded:
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
