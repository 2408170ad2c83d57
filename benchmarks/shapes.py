"""Model shapes for benchmarks, as raw Hugging Face configs without weights."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from jax_selftrain.planning import PYTHIA_SHAPES, neox_config

SHAPES: dict[str, dict[str, Any]] = {
    **{name: neox_config(*shape) for name, shape in PYTHIA_SHAPES.items()},
    "gqa": {  # eight query heads on two key/value heads; about the size of Pythia-70m
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 1536,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}


def write_config(raw: dict[str, Any]) -> str:
    """Write a config to a new folder."""
    folder = tempfile.mkdtemp()
    Path(folder, "config.json").write_text(json.dumps(raw))
    return folder
