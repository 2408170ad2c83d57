"""Writes golden/logits.npz: transformers' own logits for every parity case, for machines without torch.

Run where torch is installed, from the repository's root: `PYTHONPATH=tests python tests/hub/make_golden.py`. Weights
and tokens are regenerated from their seeds wherever the file is used (`models_factory.tiny_weights` draws them from raw
generator bits, which numpy keeps stable), so only outputs are stored: per case the logits of `GOLDEN_IDS` at every
position of one row, and the log of the summed exponentials over the whole vocabulary, which no error elsewhere escapes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from models_factory import write_tiny_hf_model
from parity_cases import CASES, VOCABULARY, case_tokens

GOLDEN = Path(__file__).parent / "golden" / "logits.npz"
GOLDEN_IDS = np.arange(5, VOCABULARY, 73)
GOLDEN_ROW = 1


def transformers_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """fp32 logits [B, T, V] of transformers' eager implementation."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens)).logits.numpy()


def golden_part(logits: np.ndarray) -> np.ndarray:
    """What is kept of logits [B, T, V]: [T, len(GOLDEN_IDS) + 1] fp32, the last column being the log-sum-exp."""
    row = logits[GOLDEN_ROW].astype(np.float64)
    top = row.max(axis=-1, keepdims=True)
    total = top + np.log(np.exp(row - top).sum(axis=-1, keepdims=True))
    return np.concatenate([row[:, GOLDEN_IDS], total], axis=-1).astype(np.float32)


def main() -> None:
    """Compute and write all cases."""
    parts = {}
    for name, (family, overrides) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            write_tiny_hf_model(folder, family, tokenizer=False, **overrides)
            parts[name] = golden_part(transformers_logits(Path(folder), case_tokens()))
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **parts)
    print(f"{GOLDEN}: {len(parts)} cases, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
