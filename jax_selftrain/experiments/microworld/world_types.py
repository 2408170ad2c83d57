"""What a little world is made of, and the random streams that its parts are drawn from."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Literal

Placement = Literal["start", "inside"]

SYLLABLES = tuple(onset + vowel for onset, vowel in itertools.product("bdfgklmnprstvz", "aeiou"))
"""Of which the names and the nonsense are made."""


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
    counterfactual: str
    repetitions: int
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
    extra_text: tuple[str, ...]
    """As much text again: the same facts, other sentences and sums, no probes."""
    facts: tuple[Fact, ...]
    probes: tuple[Probe, ...]
    tasks: dict[str, tuple[Question, ...]]


def keyed_rng(config: WorldConfig, part: str) -> random.Random:
    return random.Random(f"jax_selftrain world {config.seed} {part}")


def item_rng(config: WorldConfig, part: str) -> random.Random:
    seed = config.seed if config.items_seed is None else config.items_seed
    return random.Random(f"jax_selftrain world {seed} {part}")
