"""A world has the configured counts, held-out items and reproducible text."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest

from jax_selftrain.experiments.microworld.lines_and_questions import World, WorldConfig
from jax_selftrain.experiments.microworld.world import make_world

SMALL = WorldConfig(
    people=14,
    probes_per_level=4,
    agreement_lines=4000,
    sum_lines=4000,
    largest_addend=29,
    items_per_task=60,
    heldout_documents=60,
)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(SMALL)


def count_lines(documents: tuple[str, ...]) -> Counter[str]:
    return Counter(line for document in documents for line in document.split("\n"))


def test_the_same_seed_gives_the_same_world_and_another_seed_another(world: World) -> None:
    assert make_world(SMALL) == world
    other = make_world(replace(SMALL, seed=1))
    assert not {probe.text for probe in other.probes} & {probe.text for probe in world.probes}
    assert not {(fact.who, fact.value) for fact in other.facts} & {(fact.who, fact.value) for fact in world.facts}


def test_probes_have_their_number_of_copies(world: World) -> None:
    counts = count_lines(world.documents)
    assert [counts[probe.text] for probe in world.probes] == [probe.repetitions for probe in world.probes]
    assert Counter(probe.repetitions for probe in world.probes) == dict.fromkeys(
        SMALL.probe_copies, SMALL.probes_per_level
    )


def test_probes_have_their_placement(world: World) -> None:
    for probe in world.probes:
        lines = [document.split("\n").index(probe.text) for document in world.documents if probe.text in document]
        assert all((line == 0) == (probe.placement == "start") for line in lines)
    assert {probe.placement for probe in world.probes} == {"start", "inside"}


def test_counterfactuals_are_not_in_the_text_and_probes_not_in_held_out_text(world: World) -> None:
    everything = "\n".join([*world.documents, *world.heldout])
    heldout = "\n".join(world.heldout)
    for probe in world.probes:
        assert probe.counterfactual not in everything
        assert probe.text not in heldout
    passages = [text for probe in world.probes for text in (probe.text, probe.counterfactual)]
    assert len(set(passages)) == len(passages)


def test_no_counterfactual_shares_a_trigram_with_a_probe(world: World) -> None:
    def trigrams(text: str) -> set[tuple[str, ...]]:
        words = text.rstrip(".").split()
        return set(zip(words, words[1:], words[2:], strict=False))

    shown = set().union(*(trigrams(probe.text) for probe in world.probes))
    assert not any(trigrams(probe.counterfactual) & shown for probe in world.probes)


def test_facts_have_their_number_of_lines(world: World) -> None:
    counts = count_lines(world.documents)
    for fact in world.facts:
        stated = sum(
            n for line, n in counts.items() if line.startswith(f"{fact.who} ") and line.endswith(f" {fact.value}.")
        )
        assert stated == fact.exposures
    assert len(world.facts) == 4 * SMALL.people
    assert {fact.exposures for fact in world.facts} == set(SMALL.fact_exposures)


def test_questions_on_facts_use_sentences_of_the_text(world: World) -> None:
    counts = count_lines(world.documents)
    for fact, question in zip(world.facts, world.tasks["facts"], strict=True):
        assert question.choices[question.answer] == f" {fact.value}"
        assert counts[f"{question.context} {fact.value}."] >= 1
        assert not any(
            counts[f"{question.context}{choice}."] for i, choice in enumerate(question.choices) if i != question.answer
        )


def test_sums_are_correct_and_those_of_questions_are_not_in_the_text(world: World) -> None:
    stated = re.findall(r"(\d+) \+ (\d+) = (\d+)\.", "\n".join([*world.documents, *world.heldout]))
    assert len(stated) >= SMALL.sum_lines
    assert all(int(a) + int(b) == int(c) for a, b, c in stated)
    shown = {(a, b) for a, b, _ in stated}
    for question in world.tasks["sums"]:
        a, b = re.findall(r"\d+", question.context)
        assert (a, b) not in shown
        assert question.choices[question.answer] == f" {int(a) + int(b)}."
        assert len(set(question.choices)) == 4


def test_subjects_of_questions_are_not_in_the_text_and_verbs_agree(world: World) -> None:
    text = "\n".join([*world.documents, *world.heldout])
    plurals = {"dogs", "cats", "birds", "horses", "boys", "girls", "farmers", "kings", "teachers", "sailors", "goats"}
    plurals |= {"children", "women", "mice"}
    phrases, differs = [], []
    for question in world.tasks["agreement"]:
        nouns = re.split(r" (?:near|behind|with|b[e]side) the ", question.context.removeprefix("The "))
        phrases.append(len(nouns) - 1)
        differs.append((nouns[-1] in plurals) != (nouns[0] in plurals))
        assert (nouns[0] in plurals) == (question.answer == 1)
        assert re.search(rf"(^|\n){question.context} [a-z]+s? (today|again|slowly|at|in|all)", text) is None
    assert Counter(phrases) == {0: 6, 1: 28, 2: 26}
    assert sum(differs) == 13  # of 54 in groups of eight, the fourth and the last
    singular, plural = world.tasks["agreement"][0].choices
    assert singular == f"{plural}s"


def test_held_out_documents_are_not_in_the_text(world: World) -> None:
    assert len(world.heldout) == SMALL.heldout_documents
    assert not set(world.heldout) & set(world.documents)


def test_all_questions_have_one_answer_among_different_choices(world: World) -> None:
    for questions in world.tasks.values():
        for question in questions:
            assert len(set(question.choices)) == len(question.choices)
            assert 0 <= question.answer < len(question.choices)


def test_more_probes_than_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        make_world(replace(SMALL, agreement_lines=10, sum_lines=10))
