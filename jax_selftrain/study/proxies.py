"""Proxies: numbers that might predict a student's gain before training.

| proxy | definition |
|---|---|
| `loglikelihood_per_token`, `_per_byte` | mean log-likelihood under the student before training, nats |
| `gap_per_byte` | the same per byte, minus the source's own log-likelihood of its text |
| `similarity` | cosine of the mean TF-IDF vectors of the corpus and of the tasks' questions (words and word pairs) |
| `semantic_similarity` | cosine of the mean vectors from an embedding model, if one is set |
| `distinct_2` | distinct token bigrams of the corpus, as a share of all |
| `compression` | size after zlib at level 9, as a share of the size before |

Student and source score the same documents, chosen by a hash. Values per token depend on the tokenizer. More of each
proxy is expected to predict more gain.

Contamination of a corpus by task questions is the 13-gram check of GPT-3 (appendix C of arXiv:2005.14165): a question
is found if 13 consecutive words of it, in lower case and without punctuation, occur in one document. Shorter questions
cannot be found and are counted separately.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain import evals, hub, likelihood
from jax_selftrain.config import ScoreConfig
from jax_selftrain.corpus import Corpus, open_corpus
from jax_selftrain.io import atomic

NGRAM_LENGTH = 13


def corpus_proxies(corpus: Corpus, score: ScoreConfig, out: Path, documents: int, embedding_model: str = "") -> None:
    """Write the proxies of a corpus under a model to `out/proxies.json`.

    `score` names the model (the student or the source) and the tasks. Without an embedding model, there is no
    `semantic_similarity`. Raises InputError if the corpus has another tokenizer, or a model cannot be read.
    """
    open_corpus(corpus, tokenizer_fingerprint=hub.open_model(score.model).tokenizer_fingerprint)
    chosen = set(hash_sample(len(corpus), documents, 0))
    samples = [sample for sample in corpus.iter_samples() if sample.sample_id in chosen and len(sample.tokens)]
    loaded = hub.load_model(score.model, score.mesh, score.dtype, preset=score.preset)
    requests = [((corpus.start_id,), sample.tokens.tolist()) for sample in samples]
    answers = likelihood.loglikelihoods(loaded, requests, batch_tokens=score.batch_tokens)
    texts, questions = [sample.text for sample in samples], task_questions(score)
    found = {
        "documents": len(samples),
        "loglikelihood": float(np.sum([answer.loglikelihood for answer in answers])),
        "tokens": sum(answer.tokens for answer in answers),
        "bytes": sum(len(text.encode()) for text in texts),
        "compression": compression(texts),
        "similarity": similarity(texts, questions),
    }
    if embedding_model:
        del loaded  # one model in memory at a time
        embedder = hub.load_model(embedding_model, score.mesh, score.dtype, preset=score.preset)
        found["semantic_similarity"] = semantic_similarity(embedder, texts, questions)
    atomic.write_json(out / "proxies.json", found)


def cell_proxies(
    student: Mapping[str, Any], source: Mapping[str, Any], statistics: Mapping[str, Any]
) -> dict[str, float | None]:
    """Return a cell's proxies from both models and the corpus statistics."""
    own, others = (side["loglikelihood"] / side["bytes"] if side["bytes"] else None for side in (student, source))
    return {
        "loglikelihood_per_token": student["loglikelihood"] / student["tokens"] if student["tokens"] else None,
        "loglikelihood_per_byte": own,
        "gap_per_byte": None if own is None or others is None else own - others,
        **{name: student[name] for name in ("similarity", "semantic_similarity") if name in student},
        "distinct_2": statistics["distinct"]["2"],
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
    return _cosine(*means)


def task_questions(score: ScoreConfig) -> list[str]:
    """Return every question of the tasks with its right answer."""
    return [
        question.context + question.continuations[question.answer]
        for task in evals.load_tasks(score.tasks, score.limit)
        for question in task.questions
    ]


def compression(texts: Sequence[str]) -> float | None:
    """Return the compressed size as a share; None without text."""
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
    return _cosine(one, other)


def _cosine(one: np.ndarray, other: np.ndarray) -> float | None:
    size = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / size if size else None


def hash_sample(n: int, k: int, seed: int | None) -> list[int]:
    """Choose k of the ids 0 … n−1 by hash."""
    return sorted(range(n), key=lambda i: hashlib.sha256(f"shown in the report {seed} {i}".encode()).digest())[:k]


def contaminated_share(texts: Iterable[str], questions: Sequence[str]) -> dict[str, int]:
    """Count `questions` of 13 words or more, those `found`, those `too_short`."""
    grams = [set(_ngrams(question)) for question in questions]
    wanted = set().union(*grams)
    seen = {gram for text in (texts if wanted else ()) for gram in _ngrams(text) if gram in wanted}
    long_enough = sum(map(bool, grams))
    found = sum(not members.isdisjoint(seen) for members in grams)
    return {"questions": long_enough, "found": found, "too_short": len(grams) - long_enough}


def _ngrams(text: str) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return (tuple(words[i : i + NGRAM_LENGTH]) for i in range(len(words) - NGRAM_LENGTH + 1))
