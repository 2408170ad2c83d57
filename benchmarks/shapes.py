"""Shapes of models to measure, as raw Hugging Face configs. Their weights are random: speed does not depend on them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any


def neox(layers: int, width: int, heads: int, vocabulary: int = 50304) -> dict[str, Any]:
    """A Pythia."""
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "vocab_size": vocabulary,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "max_position_embeddings": 2048,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "pythia-14m": neox(6, 128, 4),
    "pythia-70m": neox(6, 512, 8),
    "pythia-160m": neox(12, 768, 12),
    "pythia-410m": neox(24, 1024, 16),
    "pythia-1b": neox(16, 2048, 8),
    "pythia-2.8b": neox(32, 2560, 32),
    "pythia-12b": neox(36, 5120, 40, vocabulary=50688),
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
}


def folder_of(raw: dict[str, Any]) -> str:
    """A new folder with just this config."""
    folder = tempfile.mkdtemp()
    Path(folder, "config.json").write_text(json.dumps(raw))
    return folder
