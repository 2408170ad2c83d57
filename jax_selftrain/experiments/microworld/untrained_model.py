"""Untrained models of a micro-world, in Hugging Face's format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jax_selftrain.distributed.mesh import make_mesh
from jax_selftrain.distributed.sharding import make_sharding_rules
from jax_selftrain.errors import InputError
from jax_selftrain.experiments.microworld.world_types import World
from jax_selftrain.hub.hf_config import parse_config
from jax_selftrain.hub.load import cpu_device
from jax_selftrain.hub.model_folder import complete_model, export_spec
from jax_selftrain.hub.model_ref import ModelRef
from jax_selftrain.io import atomic
from jax_selftrain.io.import_guard import block_torch_import
from jax_selftrain.io.manifest import hash_json
from jax_selftrain.models import axis_sizes, init_params

BOS_TOKEN = "<|endoftext|>"
"""Begins and ends every document, as in Pythia's tokenizer."""


def is_up_to_date(folder: Path, spec: Mapping[str, Any]) -> bool:
    """Return True if a folder holds the micro-world that `spec` describes.

    Raises:
        InputError: the folder has other content.
    """
    if not folder.exists():
        return False
    if not (folder / "world.json").exists():
        raise InputError(f"{folder}: exists but is not a micro-world; choose another --out")
    # A JSON round trip turns tuples into lists.
    if atomic.read_json(folder / "world.json") != json.loads(json.dumps(spec)):
        raise InputError(f"{folder}: is another micro-world (another seed or version); choose another --out")
    return True


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
    """Write a randomly initialized small Pythia or Llama."""
    with block_torch_import():
        from transformers import PreTrainedTokenizerFast

    special_tokens = {"bos_token": BOS_TOKEN, "eos_token": BOS_TOKEN, "unk_token": BOS_TOKEN}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens).save_pretrained(folder)
    (bos_id,) = tokenizer.encode(BOS_TOKEN).ids
    raw_config: dict[str, Any] = {
        "model_type": family,
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "bos_token_id": bos_id,
        "eos_token_id": bos_id,
    }
    if family == "llama":
        raw_config |= {
            "architectures": ["LlamaForCausalLM"],
            "num_key_value_heads": max(1, heads // 2),
            "intermediate_size": 8 * width // 3 // 8 * 8,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
        }
    else:
        raw_config |= {
            "architectures": ["GPTNeoXForCausalLM"],
            "intermediate_size": 4 * width,
            "hidden_act": "gelu",
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000,
            "use_parallel_residual": True,
            "layer_norm_eps": 1e-5,
        }
    atomic.write_json(folder / "config.json", raw_config)
    config = parse_config(raw_config, str(folder / "config.json"))
    rules = make_sharding_rules("replicated", make_mesh("", [cpu_device()]), axis_sizes(config))
    params = init_params(config, seed=0, rules=rules)
    source = ModelRef(folder.name, folder)
    provenance = {"ref": folder.name, "fingerprint": hash_json({"config": raw_config})}
    metadata = {"made_by": "demo", "seed": 0}
    complete_model(folder, params, export=export_spec(source, params), source=provenance, metadata=metadata)
