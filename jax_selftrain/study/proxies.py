"""Proxies: numbers that might predict a student's gain before training.

| proxy | definition |
|---|---|
| `loglikelihood_per_token`, `_per_byte` | mean log-likelihood under the student before training, nats |
| `gap_per_byte` | the same per byte, minus the source's own log-likelihood of its text |
| `similarity` | cosine of the mean TF-IDF vectors of the corpus and of the tasks' questions (words and word pairs) |
| `semantic_similarity` | cosine of the mean vectors from an embedding model, if one is set |
| `distinct_2` | distinct token bigrams of the corpus, as a share of all |
| `compression` | size after zlib at level 9, as a share of the size before |

Student and source score the same documents, chosen by a hash. Values per token depend on the tokenizer.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain import evals, hub, likelihood
from jax_selftrain.config import ScoreConfig
from jax_selftrain.corpus import Corpus, open_corpus
from jax_selftrain.io import atomic

EXPECTED_SIGN = {
    "loglikelihood_per_token": 1,
    "loglikelihood_per_byte": 1,
    "gap_per_byte": 1,
    "similarity": 1,
    "semantic_similarity": 1,
    "distinct_2": 1,
    "compression": 1,
}
"""The proxies, each with 1 (or −1) if more of it is expected to predict more (or less) gain."""


def corpus_proxies(
    corpus: Path, model: str, score: ScoreConfig, out: Path, *, documents: int, embedding_model: str = ""
) -> None:
    """Write the proxies of a corpus under a model to `out/proxies.json`.

    Args:
        corpus: the corpus folder.
        model: the student or the source.
        score: mesh, preset, dtype and batch of scoring, and the tasks.
        out: the folder to write to.
        documents: number of documents.
        embedding_model: model for `evals.embed_texts`; empty: no `semantic_similarity`.

    Raises:
        InputError: the corpus or one of the models cannot be read.
    """
    opened = open_corpus(corpus, tokenizer_fingerprint=hub.open_model(model).tokenizer_fingerprint)
    chosen = set(hash_sample(len(opened), documents, 0))
    samples = [sample for sample in opened.iter_samples() if sample.sample_id in chosen and len(sample.tokens)]
    loaded = hub.load_model(model, score.mesh, score.dtype, preset=score.preset)
    requests = [((opened.start_id,), sample.tokens.tolist()) for sample in samples]
    answers = likelihood.loglikelihoods(loaded, requests, batch_tokens=score.batch_tokens)
    texts = [sample.text for sample in samples]
    questions = task_questions(score)
    found = {
        "documents": len(samples),
        "loglikelihood": float(np.sum([answer.loglikelihood for answer in answers])),
        "tokens": sum(answer.tokens for answer in answers),
        "bytes": sum(len(text.encode()) for text in texts),
        "compression": _compression(texts),
        "similarity": similarity(texts, questions),
    }
    if embedding_model:
        del loaded  # one model in memory at a time
        embedder = hub.load_model(embedding_model, score.mesh, score.dtype, preset=score.preset)
        found["semantic_similarity"] = semantic_similarity(embedder, texts, questions)
    atomic.write_json(out / "proxies.json", found)


def cell_proxies(student: Mapping[str, Any], source: Mapping[str, Any], corpus: Corpus) -> dict[str, float | None]:
    """Return the proxies of a cell from those under student and source."""
    per_byte = [side["loglikelihood"] / side["bytes"] if side["bytes"] else None for side in (student, source)]
    gap = None if per_byte[0] is None or per_byte[1] is None else per_byte[0] - per_byte[1]
    return {
        "loglikelihood_per_token": student["loglikelihood"] / student["tokens"] if student["tokens"] else None,
        "loglikelihood_per_byte": per_byte[0],
        "gap_per_byte": gap,
        "similarity": student["similarity"],
        **{name: student[name] for name in ("semantic_similarity",) if name in student},
        "distinct_2": corpus.manifest["statistics"]["distinct"]["2"],
        "compression": student["compression"],
    }


def semantic_similarity(embedder: hub.LoadedModel, texts: Sequence[str], questions: Sequence[str]) -> float | None:
    """Return the cosine of mean embeddings; None without words."""
    means = []
    for side in (texts, questions):
        words = [text for text in side if text.strip()]
        if not words:
            return None
        means.append(evals.embed_texts(embedder, words).mean(axis=0, dtype=np.float64))
    one, other = means
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def task_questions(score: ScoreConfig) -> list[str]:
    """Return every question of the tasks with its right answer."""
    return [
        question.context + question.continuations[question.answer]
        for task in evals.load_tasks(score.tasks, score.limit)
        for question in task.questions
    ]


def _compression(texts: Sequence[str]) -> float | None:
    whole = "\n".join(texts).encode()
    return len(zlib.compress(whole, 9)) / len(whole) if whole else None


def similarity(texts: Sequence[str], questions: Sequence[str]) -> float | None:
    """Return the cosine of mean TF-IDF vectors; None without words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not any(text.strip() for text in texts) or not any(text.strip() for text in questions):
        return None
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]")
    rows = vectorizer.fit_transform([*texts, *questions])
    one, other = (np.asarray(part.mean(axis=0)).ravel() for part in (rows[: len(texts)], rows[len(texts) :]))
    size = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / size if size else None


def hash_sample(n: int, k: int, seed: int | None) -> list[int]:
    """Choose k of the ids 0 … n−1 by hash."""
    return sorted(range(n), key=lambda i: hashlib.sha256(f"shown in the report {seed} {i}".encode()).digest())[:k]
