"""Configs and tokenizers of a micro-world's models, in Hugging Face's format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jax_selftrain.experiments.microworld.world_types import World
from jax_selftrain.io import atomic
from jax_selftrain.io.import_guard import block_torch_import
from jax_selftrain.planning import neox_config

BOS_TOKEN = "<|endoftext|>"
"""Begins and ends every document, as in Pythia's tokenizer."""


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
    atomic.write_json(folder / "config.json", config | {"bos_token_id": bos_id, "eos_token_id": bos_id})
