"""Data types of a micro-world, and its random streams."""

from __future__ import annotations

import itertools
import random
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
