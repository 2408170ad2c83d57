"""What extraction finds, counted again by other means: plain Python for overlaps, transformers for probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest


def longest_runs(suffixes: Sequence[Sequence[int]], documents: Sequence[Sequence[int]]) -> list[int]:
    """Of each suffix, the most consecutive tokens that stand in one document."""
    runs = [0] * len(suffixes)
    for length in range(1, max(map(len, suffixes)) + 1):
        said = {tuple(row[i : i + length]) for row in documents for i in range(len(row) - length + 1)}
        for number, suffix in enumerate(suffixes):
            if any(tuple(suffix[i : i + length]) in said for i in range(len(suffix) - length + 1)):
                runs[number] = length
    return runs


def class_of(run: int, suffix: int, overlap: int) -> str:
    if run == suffix:
        return "seen"
    return "partial" if run >= overlap else "held_out"


def log_pz_of(model: Path, sequences: np.ndarray, prefix: int) -> tuple[np.ndarray, np.ndarray]:
    """log p_z [N] and exact match [N] by transformers, in a Hugging Face folder."""
    torch = pytest.importorskip("torch", reason="transformers needs torch to run a model")
    from transformers import AutoModelForCausalLM

    judge = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokens = torch.from_numpy(np.asarray(sequences, np.int64))
    with torch.no_grad():
        logits = judge(tokens).logits[:, prefix - 1 : -1].double()
    suffix = tokens[:, prefix:]
    logprobs = torch.log_softmax(logits, -1).gather(-1, suffix[..., None])[..., 0].sum(-1)
    return logprobs.numpy(), (logits.argmax(-1) == suffix).all(-1).numpy()
