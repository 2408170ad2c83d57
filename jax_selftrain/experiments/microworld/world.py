"""A micro-world: rule-based text with known facts, rules and memorized passages.

* **facts** about invented people ("Mirel lives in Ostova."), each repeated a known number of times;
* with `two_hop`, **two-hop facts** about friends ("The friend of Mirel lives in Tuvek."): a quarter is in the text, the
  others are questions that follow from two facts;
* **agreement** of subject and verb, with up to two distracting nouns between them;
* **sums** of two numbers, some with a carry;
* **probes**: nonsense passages with 1, 2, 4, … 128 copies, half of them as the first line of a document. Only
  memorization can reproduce a probe. Each has a **counterfactual** of the same distribution outside the text.

Questions on sums and agreement use combinations outside the text. A world is a pure function of its `WorldConfig`.
"""

from __future__ import annotations

import itertools

from jax_selftrain.experiments.microworld import lines_and_questions as content
from jax_selftrain.experiments.microworld.world_types import SYLLABLES, Probe, World, WorldConfig, keyed_rng


def make_world(config: WorldConfig) -> World:
    """Build a world: text, held-out text, facts, probes and questions."""
    facts = content.draw_facts(config)
    probes = _draw_probes(config)
    sums, subjects = content.held_out_sums(config), content.held_out_subjects(config)

    def make_text(split: str, facts: list[str], agreement: int, added: int) -> list[str]:
        """Return documents of fact lines, agreement lines and sums."""
        kinds = [
            facts,
            list(content.agreement_lines(config, f"{split}agreement", agreement, subjects)),
            list(content.sum_lines(config, f"{split}sums", added, sums)),
        ]
        return _group_lines(config, f"{split}documents", kinds)

    lines = [line for fact in facts for line in content.fact_lines(fact)]
    if config.two_hop:
        lines += content.two_hop_lines(config, facts)
    keyed_rng(config, "fact order").shuffle(lines)
    documents = _insert_probes(config, make_text("", lines, config.agreement_lines, config.sum_lines), probes)

    extra = [line for fact in facts for line in content.fact_lines(fact)]
    keyed_rng(config, "more facts").shuffle(extra)
    more = make_text("more ", extra, config.agreement_lines, config.sum_lines)

    third = max(1, config.heldout_documents // 3) * 6
    unseen = [content.fact_line(facts[i % len(facts)], i) for i in range(max(len(facts) * 2, third))]
    keyed_rng(config, "held-out facts").shuffle(unseen)
    heldout = make_text("held-out ", unseen[:third], third, third)

    seen = set(documents)
    return World(
        documents=tuple(documents),
        heldout=tuple([document for document in heldout if document not in seen][: config.heldout_documents]),
        extra_text=tuple(document for document in more if document not in seen),
        facts=tuple(facts),
        probes=tuple(probes),
        tasks={
            "facts": tuple(content.fact_questions(config, facts)),
            **({"two_hop": tuple(content.two_hop_questions(config, facts))} if config.two_hop else {}),
            "agreement": tuple(content.agreement_questions(config, subjects)),
            "sums": tuple(content.sum_questions(config, sums)),
        },
    )


# Probes ---------------------------------------------------------------------------------------------------------


def _draw_probes(config: WorldConfig) -> list[Probe]:
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


def _group_lines(config: WorldConfig, part: str, kinds: list[list[str]]) -> list[str]:
    """Group the lines of each kind into shuffled documents."""
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
    """Insert each copy of a probe into another document."""
    rng = keyed_rng(config, "probe places")
    for placement in ("inside", "start"):
        copies = [probe for probe in probes if probe.placement == placement for _ in range(probe.repetitions)]
        if len(copies) > len(documents):
            raise ValueError(f"{len(copies)} copies of probes do not fit into {len(documents)} documents")
        for probe, i in zip(copies, rng.sample(range(len(documents)), len(copies)), strict=True):
            lines = documents[i].split("\n")
            # A row that truncates a long document must not truncate the probe.
            at = 0 if placement == "start" else rng.randint(1, min(3, len(lines)))
            documents[i] = "\n".join([*lines[:at], probe.text, *lines[at:]])
    return documents
