"""A little world made of rules: text in which it is known what can be learnt and what can only be memorized.

A language model trained on this text can pick up four things, each under control:

* **facts** about invented people ("Mirel lives in Ostova."), each fact standing in the text a known number of times;
* with `two_hop`, **facts behind a fact**: everybody has a friend, and the text says of a quarter of them where the
  friend lives and so on ("The friend of Mirel lives in Tuvek."); of the others that is asked, and follows from two
  facts;
* **agreement** of subject and verb, with up to two nouns of the other number between them;
* **sums** of two numbers, some with a carry;
* **probes**: nonsense passages, each standing in the text 1, 2, 4, … 128 times, half of them as the first line of a
  document and half inside one. Nothing in the rest of the text helps to predict a probe, so that reproducing one is
  memorization. Every probe has a **twin** from the same generator that stands nowhere: what a model does on twins is
  what it does without having seen them.

The questions on sums and agreement are asked about combinations that stand nowhere in the text. Worlds that differ in
`seed` and agree in `items_seed` share their grammar, their arithmetic and the questions on both, and nothing else. The
whole world is a pure function of its `WorldConfig`: every part has a random stream of its own (`random.Random` seeded
by a string), so that changing one part leaves the others as they were. Nothing here knows about tokenizers or models.
"""

from __future__ import annotations

import itertools

from jax_selftrain.experiments.microworld import facts as fact_text
from jax_selftrain.experiments.microworld import grammar_and_sums
from jax_selftrain.experiments.microworld.world_types import SYLLABLES, Probe, World, WorldConfig, keyed_rng


def make_world(config: WorldConfig) -> World:
    """Build the world: its text, the text held out, the facts and probes behind it, and the questions about it."""
    facts = fact_text.draw_facts(config)
    probes = _probes(config)
    sums, subjects = grammar_and_sums.held_out_sums(config), grammar_and_sums.held_out_subjects(config)

    def text(split: str, told: list[str], agreement: int, added: int) -> list[str]:
        """Documents of lines about people, and of so many lines of each exercise."""
        kinds = [
            told,
            list(grammar_and_sums.agreement_lines(config, f"{split}agreement", agreement, subjects)),
            list(grammar_and_sums.sum_lines(config, f"{split}sums", added, sums)),
        ]
        return _documents(config, f"{split}documents", kinds)

    told = [line for fact in facts for line in fact_text.fact_lines(fact)]
    if config.two_hop:
        told += fact_text.two_hop_lines(config, facts)
    keyed_rng(config, "fact order").shuffle(told)
    documents = _insert_probes(config, text("", told, config.agreement_lines, config.sum_lines), probes)

    again = [line for fact in facts for line in fact_text.fact_lines(fact)]
    keyed_rng(config, "more facts").shuffle(again)
    more = text("more ", again, config.agreement_lines, config.sum_lines)

    third = max(1, config.heldout_documents // 3) * 6
    unseen = [fact_text.fact_line(facts[i % len(facts)], i) for i in range(max(len(facts) * 2, third))]
    keyed_rng(config, "held-out facts").shuffle(unseen)
    heldout = text("held-out ", unseen[:third], third, third)

    shown = set(documents)
    return World(
        documents=tuple(documents),
        heldout=tuple([document for document in heldout if document not in shown][: config.heldout_documents]),
        extra_text=tuple(document for document in more if document not in shown),
        facts=tuple(facts),
        probes=tuple(probes),
        tasks={
            "facts": tuple(fact_text.fact_questions(config, facts)),
            **({"two_hop": tuple(fact_text.two_hop_questions(config, facts))} if config.two_hop else {}),
            "agreement": tuple(grammar_and_sums.agreement_questions(config, subjects)),
            "sums": tuple(grammar_and_sums.sum_questions(config, sums)),
        },
    )


# Probes ---------------------------------------------------------------------------------------------------------


def _probes(config: WorldConfig) -> list[Probe]:
    rng = keyed_rng(config, "probes")
    lexicon = ["".join(pair) for pair in itertools.product(SYLLABLES, repeat=2)]
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
    rng = keyed_rng(config, part)
    documents = []
    for lines in kinds:
        at = 0
        while at < len(lines):
            size = rng.randint(1, 4)
            documents.append("\n".join(lines[at : at + size]))
            at += size
    rng.shuffle(documents)
    return documents


def _insert_probes(config: WorldConfig, documents: list[str], probes: list[Probe]) -> list[str]:
    """Put every copy of every probe into a document: as its first line, or after its first lines.

    A document has at most one of each kind.
    """
    rng = keyed_rng(config, "probe places")
    for placement in ("inside", "start"):
        copies = [probe for probe in probes if probe.placement == placement for _ in range(probe.repetitions)]
        if len(copies) > len(documents):
            raise ValueError(f"{len(copies)} copies of probes do not fit into {len(documents)} documents, one in each")
        for probe, place in zip(copies, rng.sample(range(len(documents)), len(copies)), strict=True):
            lines = documents[place].split("\n")
            # Near the beginning also when inside: a training row that cuts a long document cuts it after the probe.
            at = 0 if placement == "start" else rng.randint(1, min(3, len(lines)))
            documents[place] = "\n".join([*lines[:at], probe.text, *lines[at:]])
    return documents
