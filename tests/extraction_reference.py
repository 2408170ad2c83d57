"""Sequences to extract, and independent results: overlaps in plain Python, probabilities by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from jax_selftrain.hub import LoadedModel
from jax_selftrain.sampling import SamplingParams, generate

PREFIX, SUFFIX = 8, 24
GREEDY = SamplingParams(max_tokens=SUFFIX, temperature=0)
BATCH = 1024


def draw_greedy_paths(model: LoadedModel) -> np.ndarray:
    """Return 32 sequences whose suffix is the greedy continuation of the prefix."""
    prefixes = np.random.default_rng(0).integers(3, 512, (32, PREFIX)).astype(np.int32)
    return np.concatenate([prefixes, np.array(generate(model, prefixes.tolist(), GREEDY), np.int32)], axis=1)


def draw_random_sequences() -> np.ndarray:
    return np.random.default_rng(1).integers(3, 512, (32, PREFIX + SUFFIX)).astype(np.int32)


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
