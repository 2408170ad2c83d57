"""A micro-world: rule-based text with known facts, and untrained models.

* **facts** about invented people ("Mirel lives in Ostova."), each repeated a known number of times;
* with `two_hop`, **two-hop facts** about friends ("The friend of Mirel lives in Tuvek."): a quarter is in the text, the
  others are questions that follow from two facts;
* **agreement** of subject and verb, with up to two distracting nouns between them;
* **sums** of two numbers, some with a carry;
* **probes**: nonsense passages with 1, 2, 4, … 128 copies, half of them as the first line of a document. Only
  memorization can reproduce a probe. Each has a **counterfactual** of the same distribution outside the text.

Questions on sums and agreement use combinations outside the text. A world is a pure function of its `WorldConfig`.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jax_selftrain.experiments.microworld import lines_and_questions as content
from jax_selftrain.experiments.microworld.lines_and_questions import SYLLABLES, Probe, World, WorldConfig, keyed_rng
from jax_selftrain.io import json_files
from jax_selftrain.io.import_guard import block_torch_import
from jax_selftrain.planning import neox_config

BOS_TOKEN = "<|endoftext|>"
"""Begins and ends every document, as in Pythia's tokenizer."""


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


def train_tokenizer(worlds: Sequence[World], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer on the text of some worlds.

    Probes are excluded, so that frequent probes do not get fewer tokens than rare ones.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    probes = {probe.text for world in worlds for probe in world.probes}
    documents = (document for world in worlds for document in world.documents)
    lines = [line for document in documents for line in document.split("\n") if line not in probes]
    tokenizer = Tokenizer(models.BPE())
    # Single digits suit arithmetic.
    pieces = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["\n".join(lines[i : i + 100]) for i in range(0, len(lines), 100)], trainer)
    return tokenizer


def write_untrained_model(
    folder: Path,
    tokenizer: Any,
    *,
    width: int,
    layers: int,
    heads: int,
    positions: int,
    family: Literal["gpt_neox", "llama"] = "gpt_neox",
) -> None:
    """Write config and tokenizer of a small Pythia or Llama.

    Training from scratch initializes the weights.
    """
    with block_torch_import():
        from transformers import PreTrainedTokenizerFast

    special_tokens = {"bos_token": BOS_TOKEN, "eos_token": BOS_TOKEN, "unk_token": BOS_TOKEN}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens).save_pretrained(folder)
    (bos_id,) = tokenizer.encode(BOS_TOKEN).ids
    size = {"max_position_embeddings": positions, "initializer_range": 0.02}
    config = neox_config(layers, width, heads, tokenizer.get_vocab_size()) | size
    if family == "llama":
        shared = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
        config = size | {
            **{key: config[key] for key in shared},
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "num_key_value_heads": max(1, heads // 2),
            "intermediate_size": 8 * width // 3 // 8 * 8,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
        }
    config |= {"bos_token_id": bos_id, "eos_token_id": bos_id}
    json_files.write_json(folder / "config.json", config, checksum=False)
