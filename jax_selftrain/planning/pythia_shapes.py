"""Shapes of the Pythia models, so that a plan needs no download.

Source: EleutherAI/pythia, `models/*/*.yml`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jax_selftrain.config import yaml_io
from jax_selftrain.errors import InputError

PYTHIA_SHAPES = {  # layers, hidden size, heads, vocabulary size
    "pythia-14m": (6, 128, 4, 50304),
    "pythia-31m": (6, 256, 8, 50304),
    "pythia-70m": (6, 512, 8, 50304),
    "pythia-160m": (12, 768, 12, 50304),
    "pythia-410m": (24, 1024, 16, 50304),
    "pythia-1b": (16, 2048, 8, 50304),
    "pythia-1.4b": (24, 2048, 16, 50304),
    "pythia-2.8b": (32, 2560, 32, 50304),
    "pythia-6.9b": (32, 4096, 32, 50432),
    "pythia-12b": (36, 5120, 40, 50688),
}


def neox_config(layers: int, width: int, heads: int, vocabulary: int = 50304) -> dict[str, Any]:
    """Return the `config.json` of a Pythia model with this shape."""
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


@contextmanager
def config_only_folder(ref: str) -> Iterator[str]:
    """Yield the model, or a folder with a Pythia config.

    Names of Pythia models: `pythia-1b`, `EleutherAI/pythia-1b-deduped`.

    Raises:
      InputError: the name is neither a folder nor a Pythia model.
    """
    name = ref.removeprefix("EleutherAI/").partition("@")[0].removesuffix("-deduped")
    if Path(ref).exists() or (name not in PYTHIA_SHAPES and "/" in ref):
        yield ref
        return
    if name not in PYTHIA_SHAPES:
        hint = yaml_io.did_you_mean(name, PYTHIA_SHAPES) or f"; known names are {', '.join(PYTHIA_SHAPES)}"
        raise InputError(f"--model {ref}: no such folder or Pythia model{hint}")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(neox_config(*PYTHIA_SHAPES[name])))
        yield folder
