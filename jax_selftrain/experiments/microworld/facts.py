"""People of a micro-world: facts, lines of text and questions about them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterator

from jax_selftrain.experiments.microworld.world_types import SYLLABLES, ChoiceQuestion, Fact, WorldConfig, keyed_rng

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
