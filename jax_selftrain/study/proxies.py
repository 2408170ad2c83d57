"""Proxies that might predict a student's gain (definitions: docs/study.md).

Student and source score the same documents, chosen by a hash. Values per token depend on the tokenizer. More of each
proxy is expected to predict more gain (`proxy_relations`).

Contamination of a corpus by task questions is the 13-gram check of GPT-3 (appendix C of arXiv:2005.14165).
"""

import hashlib
import itertools
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jax_selftrain import evals, hub, likelihood, training
from jax_selftrain.config import ScoreConfig, StudyConfig, TrainConfig
from jax_selftrain.corpus import Corpus, Sample, open_corpus
from jax_selftrain.corpus.word_ngrams import NgramIndex
from jax_selftrain.errors import InputError
from jax_selftrain.evals.item_results import ScoreResult, dev_test_split, item_hash
from jax_selftrain.evals.task_names import split_names
from jax_selftrain.io import json_files
from jax_selftrain.likelihood.tokenize import encode_text
from jax_selftrain.study.option_checks import readable_texts

NGRAM_LENGTH = 13
_OPTIONAL = ("gradient_alignment", "similarity", "semantic_similarity")


def corpus_proxies(
    corpus: Corpus,
    score: ScoreConfig,
    out: Path,
    documents: int,
    *,
    train: TrainConfig | None = None,
    embedding_model: str = "",
) -> None:
    """Write the proxies of a corpus under a student to `out/proxies.json`.

    `score` names the student, the tasks and the texts. `gradient_alignment` needs `train`, the recipe of the student,
    and dev documents of the texts; `semantic_similarity` needs an embedding model. Raises InputError if the corpus has
    another tokenizer, or a model cannot be read.
    """
    samples = _choose_samples(corpus, documents)
    texts, by_task = [sample.text for sample in samples], questions_by_task(score)
    found = {
        **_measure_likelihood(corpus, samples, score),
        "compression": compression(texts),
        "similarity": similarity(texts, [question for own in by_task.values() for question in own]),
        "tasks": {task: {"similarity": similarity(texts, own)} for task, own in by_task.items()},
    }
    if train is not None and (dev := _tokenize_dev_documents(score, documents)):
        rows = [[corpus.start_id, *sample.tokens.tolist()] for sample in samples]
        found["gradient_alignment"] = training.align_gradients(train, rows, dev)
    if embedding_model:
        embedder = hub.load_model(embedding_model, score.mesh, score.dtype, preset=score.preset)
        found["semantic_similarity"], cosines = semantic_similarities(embedder, texts, by_task)
        for task, cosine in cosines.items():
            found["tasks"][task]["semantic_similarity"] = cosine
    json_files.write_json(out / "proxies.json", found)


def corpus_likelihood(corpus: Corpus, score: ScoreConfig, out: Path, documents: int) -> None:
    """Write the log-likelihood of a corpus under its source to `out/proxies.json`.

    `score` names the source. Raises InputError if the corpus has another tokenizer, or the model cannot be read.
    """
    samples = _choose_samples(corpus, documents)
    json_files.write_json(out / "proxies.json", _measure_likelihood(corpus, samples, score))


def _choose_samples(corpus: Corpus, documents: int) -> list[Sample]:
    chosen = set(hash_sample(len(corpus), documents, 0))
    return [sample for sample in corpus.iter_samples() if sample.sample_id in chosen and len(sample.tokens)]


def _measure_likelihood(corpus: Corpus, samples: Sequence[Sample], score: ScoreConfig) -> dict[str, Any]:
    open_corpus(corpus, tokenizer_fingerprint=hub.open_model(score.model).tokenizer_fingerprint)
    loaded = hub.load_model(score.model, score.mesh, score.dtype, preset=score.preset)
    requests = [((corpus.start_id,), sample.tokens.tolist()) for sample in samples]
    answers = likelihood.loglikelihoods(loaded, requests, batch_tokens=score.batch_tokens)
    return {
        "documents": len(samples),
        "loglikelihood": float(np.sum([answer.loglikelihood for answer in answers])),
        "tokens": sum(answer.tokens for answer in answers),
        "bytes": sum(len(sample.text.encode()) for sample in samples),
    }


def check_proxies(config: StudyConfig) -> None:
    """Refuse `proxy_steps` that cannot be measured. Raises InputError."""
    sources = config.sources or config.students or config.models
    is_measured = config.proxy_sample_size > 0 and len(sources) > 1
    is_unread = readable_texts(config, config.score.texts) != [*config.score.texts]
    if config.proxy_steps and not (is_measured and (is_unread or _list_dev_documents(config.score))):
        raise InputError(
            f"proxy_steps {config.proxy_steps}: needs several sources, proxy_sample_size, and score.texts with a "
            "document in the dev split (30 %); set these, or remove it"
        )


def _list_dev_documents(score: ScoreConfig) -> list[str]:
    texts = evals.load_texts(score.texts, score.text_limit)
    return [one for text in texts for one in text.documents if dev_test_split(item_hash("", [one])) == "dev"]


def _tokenize_dev_documents(score: ScoreConfig, documents: int) -> list[list[int]]:
    """Tokenize dev documents, chosen by a hash, after the start token."""
    opened, found = hub.open_model(score.model), _list_dev_documents(score)
    start = opened.special_tokens.bos_token_id
    if start is None:
        raise InputError(f"{score.model}: names no BOS or EOS token, so texts have no start token")
    chosen = [found[n] for n in hash_sample(len(found), documents, 0)]
    return [[start, *encode_text(opened.tokenizer, text, score.text_max_tokens)[0]] for text in chosen]


def probe_gain(before: ScoreResult, after: ScoreResult) -> float | None:
    """Return the fall of the bits per byte of the dev documents.

    None without dev documents.
    """
    rates = []
    for scored in (before, after):
        texts = [items.select("dev") for items in scored.items.values() if items.kind == "text"]
        size = sum(int(text.bytes.sum()) for text in texts)
        rates.append(-sum(float(text.loglikelihood.sum()) for text in texts) / size / math.log(2) if size else None)
    return None if rates[0] is None or rates[1] is None else rates[0] - rates[1]


def cell_proxies(
    student: Mapping[str, Any], source: Mapping[str, Any], statistics: Mapping[str, Any]
) -> dict[str, float | None]:
    """Return a cell's proxies from both models and the corpus statistics."""
    own, others = (side["loglikelihood"] / side["bytes"] if side["bytes"] else None for side in (student, source))
    return {
        "loglikelihood_per_token": student["loglikelihood"] / student["tokens"] if student["tokens"] else None,
        "loglikelihood_per_byte": own,
        "gap_per_byte": None if own is None or others is None else own - others,
        **{name: student[name] for name in _OPTIONAL if name in student},
        "distinct_2": statistics["distinct"]["2"],
        "compression": student["compression"],
    }


def semantic_similarities(
    embedder: hub.LoadedModel, texts: Sequence[str], questions: Mapping[str, Sequence[str]]
) -> tuple[float | None, dict[str, float | None]]:
    """Return cosines of mean embeddings: to all questions, and by task.

    None without words.
    """

    def embed(side: Sequence[str]) -> np.ndarray:
        return evals.embed_texts(embedder, [text for text in side if text.strip()]).sum(axis=0, dtype=np.float64)

    corpus, sums = embed(texts), {task: embed(own) for task, own in questions.items()}
    cosines = {task: _cosine(corpus, total) for task, total in sums.items()}
    return _cosine(corpus, np.sum(list(sums.values()), axis=0)) if sums else None, cosines


def questions_by_task(score: ScoreConfig) -> dict[str, list[str]]:
    """Return the questions of each task file with their right answers."""
    return {
        task.name: [question.context + question.continuations[question.answer] for question in task.questions]
        for task in evals.load_tasks(split_names(score.tasks)[0], score.limit)
    }


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
    index = NgramIndex.build({str(number): [question] for number, question in enumerate(questions)}, NGRAM_LENGTH)
    long_enough, found, remaining = len(np.unique(index.members[:, 1])), np.zeros(0, np.int64), iter(texts)
    while long_enough and (batch := list(itertools.islice(remaining, 1024))):
        _, ngrams = index.find(pa.array(batch, pa.string()))
        found = np.union1d(found, index.list_groups(ngrams)[1])
    return {"questions": long_enough, "found": len(found), "too_short": len(questions) - long_enough}
