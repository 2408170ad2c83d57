"""Configs of all supported variants of all families.

Each case is (family, raw config keys). Sliding windows and rotary lengths are small, so that 528 positions reach every
branch: unscaled, interpolated and scaled frequencies, and queries beyond the window.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from models_factory import Family

VOCABULARY, ROWS, POSITIONS = 512, 2, 528

GOLDEN = Path(__file__).parent / "hub" / "golden" / "logits.npz"
GOLDEN_IDS = np.arange(5, VOCABULARY, 73)
GOLDEN_ROW = 1

_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
    "rope_type": "llama3",
}
_YARN_ALONE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
_YARN = _YARN_ALONE | {"rope_theta": 10000.0}

CASES: dict[str, tuple[Family, dict[str, Any]]] = {
    # GPT-NeoX; the first is Pythia
    "neox": ("gpt_neox", {"rotary_pct": 0.25, "rotary_emb_base": 10000}),
    "neox-sequential": ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 1.0, "layer_norm_eps": 1e-3}),
    "neox-tied": ("gpt_neox", {"tie_word_embeddings": True}),
    "neox-no-attention-bias": ("gpt_neox", {"attention_bias": False, "hidden_act": "gelu_new"}),
    "neox-gelu-fast": ("gpt_neox", {"hidden_act": "gelu_fast", "num_attention_heads": 2, "rotary_emb_base": 50000}),
    "neox-linear": ("gpt_neox", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rotary_pct": 0.5}),
    "neox-yarn": ("gpt_neox", {"rope_parameters": _YARN | {"partial_rotary_factor": 0.5}}),
    # Llama 1, 2, 3
    "llama-mha": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    "llama-gqa": ("llama", {"num_key_value_heads": 2, "rope_theta": 500000.0}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-attention-bias": ("llama", {"attention_bias": True}),
    "llama-mlp-bias": ("llama", {"mlp_bias": True, "hidden_act": "relu"}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}),
    "llama-head-dim": ("llama", {"head_dim": 32}),
    "llama-linear": ("llama", {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama3-v4": ("llama", {"rope_theta": 500000.0, "rope_scaling": _LLAMA3}),
    "llama3-v5": ("llama", {"rope_parameters": _LLAMA3 | {"rope_theta": 10000.0}}),
    "llama-yarn": ("llama", {"rope_parameters": _YARN}),
    "llama-yarn-factor": ("llama", {"rope_parameters": _YARN | {"attention_factor": 0.8, "beta_fast": 16.0}}),
    "llama-yarn-mscale": ("llama", {"rope_parameters": _YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}}),
    "llama-yarn-untruncated": ("llama", {"rope_parameters": _YARN | {"truncate": False, "beta_slow": 2.0}}),
    # Qwen2, Qwen2.5
    "qwen2": ("qwen2", {"rope_theta": 1000000.0}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen2-layer-types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 100,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen2-yarn": (
        "qwen2",
        {
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        },
    ),
    # Qwen3
    "qwen3": ("qwen3", {"rope_theta": 1000000.0}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
    "qwen3-attention-bias": ("qwen3", {"attention_bias": True, "num_key_value_heads": 4}),
    "qwen3-window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    # Mistral
    "mistral": ("mistral", {"sliding_window": None, "rope_theta": 1000000.0}),
    "mistral-window": ("mistral", {"sliding_window": 64, "head_dim": 32}),
    # OLMo-2, OLMo-3
    "olmo2": ("olmo2", {"rope_theta": 500000.0, "rms_norm_eps": 1e-6, "num_key_value_heads": 4}),
    "olmo2-gqa": ("olmo2", {"attention_bias": True, "tie_word_embeddings": True}),
    "olmo3": ("olmo3", {"rope_theta": 500000.0, "rope_scaling": _YARN_ALONE, "sliding_window": 64}),
    "olmo3-layer-types": (
        "olmo3",
        {
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": _LLAMA3 | {"rope_theta": 10000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30000.0},
            },
        },
    ),
    # SmolLM3
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "tie_word_embeddings": True}),
    "smollm3-interval": (
        "smollm3",
        {
            "num_hidden_layers": 4,
            "no_rope_layers": None,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 64,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    # GPT-2; with gelu, Cerebras-GPT
    "gpt2": ("gpt2", {}),
    "cerebras-gpt": ("gpt2", {"activation_function": "gelu", "n_inner": 160, "layer_norm_epsilon": 1e-3}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "n_head": 2}),
    # GPT-Neo
    "gpt-neo": ("gpt_neo", {}),
    "gpt-neo-global": ("gpt_neo", {"attention_types": [[["global"], 2]], "tie_word_embeddings": False}),
    "gpt-neo-local": ("gpt_neo", {"num_layers": 3, "attention_types": [[["local"], 1], [["global", "local"], 1]]}),
}


def case_tokens() -> np.ndarray:
    """Return the input of every case: token ids [ROWS, POSITIONS]."""
    raw = np.random.Philox(7).random_raw(ROWS * POSITIONS)
    return (np.asarray(raw) % VOCABULARY).astype(np.int64).reshape(ROWS, POSITIONS)


def transformers_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Return fp32 logits [B, T, V] of transformers with eager attention."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens)).logits.numpy()


def golden_logits(logits: np.ndarray) -> np.ndarray:
    """Select the stored logits of one row and append their log-sum-exp.

    Args:
        logits: [B, T, V].

    Returns:
        [T, len(GOLDEN_IDS) + 1], fp32; the last column is the log-sum-exp over V.
    """
    row = logits[GOLDEN_ROW].astype(np.float64)
    top = row.max(axis=-1, keepdims=True)
    total = top + np.log(np.exp(row - top).sum(axis=-1, keepdims=True))
    return np.concatenate([row[:, GOLDEN_IDS], total], axis=-1).astype(np.float32)
