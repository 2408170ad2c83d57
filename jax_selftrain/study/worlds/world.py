"""A little world made of rules: text in which it is known what can be learnt and what can only be memorised.

A language model trained on this text can pick up four things, each under control:

* **facts** about invented people ("Mirel lives in Ostova."), each fact standing in the text a known number of times;
* with `two_hop`, **facts behind a fact**: everybody has a friend, and the text says of a quarter of them where the
  friend lives and so on ("The friend of Mirel lives in Tuvek."); of the others that is asked, and follows from two
  facts;
* **agreement** of subject and verb, with up to two nouns of the other number between them;
* **sums** of two numbers, some with a carry;
* **probes**: nonsense passages, each standing in the text 1, 2, 4, … 128 times, half of them as the first line of a
  document and half inside one. Nothing in the rest of the text helps to predict a probe, so that reproducing one is
  memorisation. Every probe has a **twin** from the same generator that stands nowhere: what a model does on twins is
  what it does without having seen them.

The questions on sums and agreement are asked about combinations that stand nowhere in the text. Worlds that differ in
`seed` and agree in `items_seed` share their grammar, their arithmetic and the questions on both, and nothing else. The
whole world is a pure function of its `WorldConfig`: every part has a random stream of its own (`random.Random` seeded
by a string), so that changing one part leaves the others as they were. Nothing here knows about tokenizers or models.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

Placement = Literal["start", "inside"]

_SYLLABLES = tuple(onset + vowel for onset, vowel in itertools.product("bdfgklmnprstvz", "aeiou"))

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


@dataclass(frozen=True)
class WorldConfig:
    """How large the world is, and how often its facts and probes are shown."""

    seed: int = 0
    """Seed of everything in the world."""
    items_seed: int | None = None
    """Seed of what is asked about agreement and sums; unset: `seed`."""
    two_hop: bool = False
    """Whether people have friends, and questions are asked about these."""
    people: int = 130
    """Invented people; each has a home, a job, a pet and a meal."""
    fact_exposures: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Facts stand in the text this many times, in equal shares."""
    probe_copies: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """Probes stand in the text this many times, in equal shares."""
    probes_per_level: int = 16
    """Probes (and as many twins) for each number of copies."""
    probe_words: int = 11
    """Nonsense words in one probe."""
    agreement_lines: int = 5_000
    """Sentences in the text that show subject-verb agreement."""
    sum_lines: int = 20_000
    """Sums in the text."""
    largest_addend: int = 39
    """Sums add two numbers from 0 to this one."""
    items_per_task: int = 500
    """Questions on agreement and on sums (facts: one question for each fact)."""
    heldout_documents: int = 300
    """Documents of the same kinds that do not belong to the text."""


@dataclass(frozen=True)
class Fact:
    """One person's home, job, pet or meal, and how many lines of the text state it."""

    who: str
    relation: str
    value: str
    exposures: int


@dataclass(frozen=True)
class Probe:
    """A nonsense passage, how often and where it stands in the text, and its twin that stands nowhere."""

    text: str
    twin: str
    copies: int
    placement: Placement


@dataclass(frozen=True)
class Question:
    """A multiple-choice item; context and choice are joined exactly as they stand."""

    context: str
    choices: tuple[str, ...]
    answer: int
    grade: str = ""
    """How hard it is: exposures of a fact, nouns that distract from agreement, carries of a sum."""
    cluster: str | None = None
    """The person it is about: questions about one are not independent."""


@dataclass(frozen=True)
class World:
    """Everything that one `WorldConfig` makes."""

    documents: tuple[str, ...]
    heldout: tuple[str, ...]
    more: tuple[str, ...]
    """As much text again: the same facts, other sentences and sums, no probes."""
    facts: tuple[Fact, ...]
    probes: tuple[Probe, ...]
    tasks: dict[str, tuple[Question, ...]]


def make_world(config: WorldConfig) -> World:
    """Build the world: its text, the text held out, the facts and probes behind it, and the questions about it."""
    facts = _facts(config)
    probes = _probes(config)
    asked_sums = _asked_sums(config)
    asked_subjects = _asked_subjects(config)

    fact_lines = [line for fact in facts for line in _fact_lines(fact)]
    if config.two_hop:
        fact_lines += _two_hop_lines(config, facts)
    _stream(config, "fact order").shuffle(fact_lines)
    agreement_lines = list(_agreement_lines(config, "agreement", config.agreement_lines, asked_subjects))
    sum_lines = list(_sum_lines(config, "sums", config.sum_lines, asked_sums))
    documents = _documents(config, "documents", [fact_lines, agreement_lines, sum_lines])
    documents = _with_probes(config, documents, probes)

    more_facts = [_fact_line(fact, form) for fact in facts for form in range(fact.exposures)]
    _stream(config, "more facts").shuffle(more_facts)
    more = _documents(
        config,
        "more documents",
        [
            more_facts,
            list(_agreement_lines(config, "more agreement", config.agreement_lines, asked_subjects)),
            list(_sum_lines(config, "more sums", config.sum_lines, asked_sums)),
        ],
    )
    third = max(1, config.heldout_documents // 3) * 6
    heldout_facts = [_fact_line(facts[i % len(facts)], i) for i in range(max(len(facts) * 2, third))]
    _stream(config, "held-out facts").shuffle(heldout_facts)
    heldout = _documents(
        config,
        "held-out documents",
        [
            heldout_facts[:third],
            list(_agreement_lines(config, "held-out agreement", third, asked_subjects)),
            list(_sum_lines(config, "held-out sums", third, asked_sums)),
        ],
    )
    shown = set(documents)
    return World(
        documents=tuple(documents),
        heldout=tuple([text for text in heldout if text not in shown][: config.heldout_documents]),
        more=tuple(text for text in more if text not in shown),
        facts=tuple(facts),
        probes=tuple(probes),
        tasks={
            "facts": tuple(_fact_questions(config, facts)),
            **({"two_hop": tuple(_two_hop_questions(config, facts))} if config.two_hop else {}),
            "agreement": tuple(_agreement_questions(config, asked_subjects)),
            "sums": tuple(_sum_questions(config, asked_sums)),
        },
    )


def _stream(config: WorldConfig, part: str) -> random.Random:
    return random.Random(f"jax_selftrain world {config.seed} {part}")


def _item_stream(config: WorldConfig, part: str) -> random.Random:
    seed = config.seed if config.items_seed is None else config.items_seed
    return random.Random(f"jax_selftrain world {seed} {part}")


# People and facts -----------------------------------------------------------------------------------------------


def _facts(config: WorldConfig) -> list[Fact]:
    rng = _stream(config, "facts")
    names = _words(rng, config.people, 2, ending=("n", "l", "s", "r"))
    towns = _words(rng, 12, 3, ending=("",), avoid=names)
    values = {"home": tuple(towns), **_VALUES}
    pairs = [(who, relation) for who in names for relation in _RELATIONS]
    rng.shuffle(pairs)
    levels = itertools.cycle(config.fact_exposures)
    facts = [Fact(who, relation, rng.choice(values[relation]), next(levels)) for who, relation in pairs]
    if config.two_hop:
        # A ring in random order: everybody is somebody's friend and nobody their own.
        ring = _stream(config, "friends").sample(names, len(names))
        often = max(config.fact_exposures)
        facts += [Fact(who, _FRIEND, friend, often) for who, friend in zip(ring, [*ring[1:], ring[0]], strict=True)]
    return facts


def _two_hops(facts: list[Fact], *, asked: bool) -> Iterator[tuple[str, Fact]]:
    """(who, a fact about their friend): of every fourth person it is told, of the others it is asked."""
    of = {(fact.who, fact.relation): fact for fact in facts}
    friends = [fact for fact in facts if fact.relation == _FRIEND]
    for number, friendship in enumerate(friends):
        if (number % 4 != 0) is asked:
            for relation in _RELATIONS:
                yield friendship.who, of[friendship.value, relation]


def _two_hop_context(who: str, fact: Fact) -> str:
    return _RELATIONS[fact.relation][0].format(who=f"The friend of {who}")


def _two_hop_lines(config: WorldConfig, facts: list[Fact]) -> list[str]:
    told = [f"{_two_hop_context(who, fact)} {fact.value}." for who, fact in _two_hops(facts, asked=False)]
    return told * max(1, max(config.fact_exposures) // 4)


def _two_hop_questions(config: WorldConfig, facts: list[Fact]) -> Iterator[Question]:
    rng = _stream(config, "two-hop questions")
    values = _values_of(facts)
    for who, fact in _two_hops(facts, asked=True):
        yield _question(rng, _two_hop_context(who, fact), fact, values, who)


def _words(
    rng: random.Random, count: int, syllables: int, ending: tuple[str, ...], avoid: Collection[str] = ()
) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        word = "".join(rng.choice(_SYLLABLES) for _ in range(syllables)) + rng.choice(ending)
        if word.capitalize() not in avoid:
            found[word.capitalize()] = None
    return list(found)


def _fact_line(fact: Fact, form: int) -> str:
    forms = _FRIENDSHIP if fact.relation == _FRIEND else _RELATIONS[fact.relation]
    return f"{forms[form % len(forms)].format(who=fact.who)} {fact.value}."


def _fact_lines(fact: Fact) -> Iterator[str]:
    # The first form is the one that questions use, so that even a fact shown once is shown in that form.
    return (_fact_line(fact, form) for form in range(fact.exposures))


def _fact_questions(config: WorldConfig, facts: list[Fact]) -> Iterator[Question]:
    rng = _stream(config, "fact questions")
    values = _values_of(facts)
    for fact in facts:
        if fact.relation != _FRIEND:
            yield _question(rng, _RELATIONS[fact.relation][0].format(who=fact.who), fact, values, fact.who)


def _values_of(facts: list[Fact]) -> dict[str, list[str]]:
    return {relation: sorted({fact.value for fact in facts if fact.relation == relation}) for relation in _RELATIONS}


def _question(rng: random.Random, context: str, fact: Fact, values: dict[str, list[str]], cluster: str) -> Question:
    """Which value has this fact? The wrong ones are other people's."""
    others = rng.sample([value for value in values[fact.relation] if value != fact.value], 3)
    choices = [fact.value, *others]
    rng.shuffle(choices)
    grade = f"shown {fact.exposures}×"
    return Question(context, tuple(f" {choice}" for choice in choices), choices.index(fact.value), grade, cluster)


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


def _asked_subjects(config: WorldConfig) -> list[_Subject]:
    """Subjects of the questions, some of whose last nouns oppose the head in number.

    Whoever takes the last noun for the subject is right about most and wrong about these: there is something to learn.
    """
    rng = _item_stream(config, "asked subjects")
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


def _agreement_lines(config: WorldConfig, part: str, count: int, asked: list[_Subject]) -> Iterator[str]:
    rng = _stream(config, part)
    withheld = set(asked)
    while count:
        subject = _draw_subject(rng)
        if subject in withheld:
            continue
        singular = rng.choice(tuple(_VERBS))
        verb = _VERBS[singular] if subject[0][1] else singular
        yield f"{_subject_text(subject, rng)} {verb} {rng.choice(_ADVERBS)}."
        count -= 1


def _agreement_questions(config: WorldConfig, asked: list[_Subject]) -> Iterator[Question]:
    rng = _item_stream(config, "agreement questions")
    for subject in asked:
        singular = rng.choice(tuple(_VERBS))
        choices = (f" {singular}", f" {_VERBS[singular]}")
        distracting = sum(plural != subject[0][1] for _, plural in subject[1:])
        yield Question(_subject_text(subject, rng), choices, int(subject[0][1]), f"{distracting} distracting")


# Sums -----------------------------------------------------------------------------------------------------------


def _asked_sums(config: WorldConfig) -> list[tuple[int, int]]:
    addends = range(config.largest_addend + 1)
    pairs = [(a, b) for a in addends for b in addends]
    return _item_stream(config, "asked sums").sample(pairs, config.items_per_task)


def _sum_lines(config: WorldConfig, part: str, count: int, asked: list[tuple[int, int]]) -> Iterator[str]:
    rng = _stream(config, part)
    withheld = set(asked)
    while count:
        a, b = rng.randint(0, config.largest_addend), rng.randint(0, config.largest_addend)
        if (a, b) in withheld:
            continue
        yield f"{a} + {b} = {a + b}."
        count -= 1


def _sum_questions(config: WorldConfig, asked: list[tuple[int, int]]) -> Iterator[Question]:
    rng = _item_stream(config, "sum questions")
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


# Probes ---------------------------------------------------------------------------------------------------------


def _probes(config: WorldConfig) -> list[Probe]:
    rng = _stream(config, "probes")
    lexicon = ["".join(pair) for pair in itertools.product(_SYLLABLES, repeat=2)]
    needed = 2 * config.probes_per_level * len(config.probe_copies)
    found: dict[str, None] = {}
    while len(found) < needed:
        found[" ".join(rng.choice(lexicon) for _ in range(config.probe_words)) + "."] = None
    texts = iter(found)
    return [
        Probe(next(texts), next(texts), copies, "start" if number % 2 == 0 else "inside")
        for copies in config.probe_copies
        for number in range(config.probes_per_level)
    ]


# Documents ------------------------------------------------------------------------------------------------------


def _documents(config: WorldConfig, part: str, kinds: list[list[str]]) -> list[str]:
    """Group the lines of each kind, in the order given, into documents of 1 to 4 lines; shuffle the documents."""
    rng = _stream(config, part)
    documents = []
    for lines in kinds:
        at = 0
        while at < len(lines):
            size = rng.randint(1, 4)
            documents.append("\n".join(lines[at : at + size]))
            at += size
    rng.shuffle(documents)
    return documents


def _with_probes(config: WorldConfig, documents: list[str], probes: list[Probe]) -> list[str]:
    """Put every copy of every probe into a document: as its first line, or after its first lines.

    A document has at most one of each kind.
    """
    rng = _stream(config, "probe places")
    for placement in ("inside", "start"):
        copies = [probe for probe in probes if probe.placement == placement for _ in range(probe.copies)]
        if len(copies) > len(documents):
            raise ValueError(f"{len(copies)} copies of probes do not fit into {len(documents)} documents, one in each")
        for probe, place in zip(copies, rng.sample(range(len(documents)), len(copies)), strict=True):
            lines = documents[place].split("\n")
            # Near the beginning also when inside: a training row that cuts a long document cuts it after the probe.
            at = 0 if placement == "start" else rng.randint(1, min(3, len(lines)))
            documents[place] = "\n".join([*lines[:at], probe.text, *lines[at:]])
    return documents
