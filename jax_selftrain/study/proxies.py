"""What can be said of a corpus before anybody is trained on it, in the hope that it foretells who will learn from it.

| proxy | what it is |
|---|---|
| `loglikelihood_per_token`, `_per_byte` | mean log-likelihood of the text under the student before training, nats |
| `gap_per_byte` | that per byte, minus the source's own of what it wrote: how strange the text is to this reader |
| `similarity` | cosine of the mean TF-IDF vectors of the corpus and of what the tasks ask (words and pairs of words) |
| `semantic_similarity` | cosine of the mean vectors that an embedding model gives both, where one is named |
| `distinct_2` | different pairs of neighboring tokens in the corpus, as a share of all |
| `compression` | size after zlib at level 9, as a share of the size before |
| `self_bleu` | mean BLEU of a document against the others: the lower, the more diverse |

Likelihoods are taken over the same documents on both sides, chosen by a hash of their numbers. Per token they depend on
the tokenizer, per byte they do not.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain import evals, hub, likelihood
from jax_selftrain.config import ScoreConfig
from jax_selftrain.corpus import Corpus, open_corpus
from jax_selftrain.io import atomic
from jax_selftrain.study.results import hash_sample

EXPECTED_SIGN = {
    "loglikelihood_per_token": 1,
    "loglikelihood_per_byte": 1,
    "gap_per_byte": 1,
    "similarity": 1,
    "semantic_similarity": 1,
    "distinct_2": 1,
    "compression": 1,
    "self_bleu": -1,
}
"""The proxies, and which way each is said to point: 1 where more of it promises more gain."""

BLEU_DOCUMENTS = 64
"""Documents whose BLEU against one another is taken: every pair is compared."""


def corpus_proxies(
    corpus: Path, model: str, score: ScoreConfig, out: Path, *, documents: int, embedding_model: str = ""
) -> None:
    """Write `out/proxies.json`: what the text is to a model in whose tokens the corpus stands.

    `score` says where and in what type likelihoods are computed, and by its tasks what will be asked; `embedder` is a
    model that turns texts into vectors (`scoring.embed_texts`).

    Raises:
        InputError: the corpus or one of the models cannot be read.
    """
    opened = open_corpus(corpus, tokenizer_fingerprint=hub.tokenizer_fingerprint(model))
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
        "self_bleu": self_bleu(texts[:BLEU_DOCUMENTS]),
        "similarity": similarity(texts, questions),
    }
    if embedding_model:
        del loaded  # one model at a time
        read = hub.load_model(embedding_model, score.mesh, score.dtype, preset=score.preset)
        found["semantic_similarity"] = semantic_similarity(read, texts, questions)
    atomic.write_json(out / "proxies.json", found)


def cell_proxies(student: Mapping[str, Any], source: Mapping[str, Any], corpus: Corpus) -> dict[str, float | None]:
    """The proxies of one cell, from what the student and the source made of the text."""
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
        "self_bleu": student["self_bleu"],
    }


def semantic_similarity(embedder: hub.LoadedModel, texts: Sequence[str], asked: Sequence[str]) -> float | None:
    """Cosine of the mean vectors of two sets of texts; None where one has no words."""
    means = []
    for side in (texts, asked):
        words = [text for text in side if text.strip()]
        if not words:
            return None
        means.append(evals.embed_texts(embedder, words).mean(axis=0, dtype=np.float64))
    one, other = means
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def task_questions(score: ScoreConfig) -> list[str]:
    """What the tasks ask, each question with its right answer."""
    return [
        question.context + question.continuations[question.answer]
        for task in evals.load_tasks(score.tasks, score.limit)
        for question in task.questions
    ]


def _compression(texts: Sequence[str]) -> float | None:
    whole = "\n".join(texts).encode()
    return len(zlib.compress(whole, 9)) / len(whole) if whole else None


def self_bleu(texts: Sequence[str]) -> float | None:
    """Mean BLEU-4 (0 to 100) of each text with all others as references, by sacrebleu; None of fewer than two."""
    from sacrebleu.metrics.bleu import BLEU

    texts = [text for text in texts if text.strip()]
    if len(texts) < 2:
        return None
    bleu = BLEU(effective_order=True)
    return float(
        np.mean([bleu.sentence_score(text, [*texts[:i], *texts[i + 1 :]]).score for i, text in enumerate(texts)])
    )


def similarity(texts: Sequence[str], asked: Sequence[str]) -> float | None:
    """Cosine of the mean TF-IDF vectors of two sets of texts, by scikit-learn; None where one has no words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not any(text.strip() for text in texts) or not any(text.strip() for text in asked):
        return None
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]")
    rows = vectorizer.fit_transform([*texts, *asked])
    one, other = (np.asarray(part.mean(axis=0)).ravel() for part in (rows[: len(texts)], rows[len(texts) :]))
    size = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / size if size else None
