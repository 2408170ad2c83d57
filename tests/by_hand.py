"""Independent extraction results: overlaps in plain Python, probabilities by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest


def longest_runs(suffixes: Sequence[Sequence[int]], documents: Sequence[Sequence[int]]) -> list[int]:
    """Return the longest match of each suffix with one document."""
    runs = [0] * len(suffixes)
    for length in range(1, max(map(len, suffixes)) + 1):
        present = {tuple(row[i : i + length]) for row in documents for i in range(len(row) - length + 1)}
        for number, suffix in enumerate(suffixes):
            if any(tuple(suffix[i : i + length]) in present for i in range(len(suffix) - length + 1)):
                runs[number] = length
    return runs


def classify_overlap(run: int, suffix: int, overlap: int) -> str:
    if run == suffix:
        return "seen"
    return "partial" if run >= overlap else "held_out"


def compute_log_pz(model: Path, sequences: np.ndarray, prefix: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute log p_z [N] and exact match [N] with transformers."""
    torch = pytest.importorskip("torch", reason="transformers needs torch to run a model")
    from transformers import AutoModelForCausalLM

    judge = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokens = torch.from_numpy(np.asarray(sequences, np.int64))
    with torch.no_grad():
        logits = judge(tokens).logits[:, prefix - 1 : -1].double()
    suffix = tokens[:, prefix:]
    logprobs = torch.log_softmax(logits, -1).gather(-1, suffix[..., None])[..., 0].sum(-1)
    return logprobs.numpy(), (logits.argmax(-1) == suffix).all(-1).numpy()
