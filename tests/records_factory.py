"""Token records for tests, and independent measures of them in plain Python."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jax_selftrain.evals.token_records import RECORDS

Document = Mapping[str, Any]


def write_records(path: Path, sets: Mapping[str, Sequence[Document]], model: str = "m") -> Path:
    """Write records of documents, each with `pieces` and `logprob`; other columns have defaults."""
    rows = []
    for name, documents in sets.items():
        for i, given in enumerate(documents):
            n = len(given["logprob"])
            pieces = given.get("pieces", ["x"] * n)
            row = {"set": name, "document": i, "text": "".join(pieces), "tokens": list(range(n)), "pieces": pieces}
            rows.append(row | {"mean_logprob": [-1.0] * n, "std_logprob": [1.0] * n, "greedy": [0] * n} | dict(given))
    table = pa.Table.from_pylist(rows, RECORDS).replace_schema_metadata({"model": model, "tokenizer": "t"})
    pq.write_table(table, path)
    return path


def full_logit_scores(logits: np.ndarray, targets: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the scores of tokens from all logits [n, V] in float64."""
    logprobs = np.asarray(logits, np.float64)
    logprobs = logprobs - logprobs.max(-1, keepdims=True)
    logprobs -= np.log(np.exp(logprobs).sum(-1, keepdims=True))
    mean = (np.exp(logprobs) * logprobs).sum(-1)
    second = (np.exp(logprobs) * logprobs**2).sum(-1)
    return {
        "logprob": logprobs[np.arange(len(targets)), targets],
        "mean_logprob": mean,
        "std_logprob": np.sqrt(second - mean**2),
        "greedy": logprobs.argmax(-1),
    }


def membership_scores(text: str, scores: Mapping[str, Sequence[float]], k: float) -> dict[str, float]:
    """Compute the scores of a document as in the papers, token by token."""
    logprob = list(map(float, scores["logprob"]))
    moments = zip(logprob, scores["mean_logprob"], scores["std_logprob"], strict=True)
    lowest = max(1, math.floor(len(logprob) * k / 100))
    normalized = [(value - float(mean)) / float(std) for value, mean, std in moments]
    return {
        "loss": sum(logprob) / len(logprob),
        "zlib": sum(logprob) / len(zlib.compress(text.encode())),
        "min_k": sum(sorted(logprob)[:lowest]) / lowest,
        "min_k_plus_plus": sum(sorted(normalized)[:lowest]) / lowest,
    }


def pairwise_auc(members: Sequence[float], nonmembers: Sequence[float]) -> float:
    """Compare every pair."""
    pairs = [(a > b) + (a == b) / 2 for a in members for b in nonmembers]
    return sum(pairs) / len(pairs)
