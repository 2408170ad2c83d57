"""Proxies that might predict a student's gain (definitions: docs/study.md).

Student and source score the same documents, chosen by a hash. Values per token depend on the tokenizer. More of each
proxy is expected to predict more gain. Cells are not independent: all students share the sources. Ranks are therefore
centered within each student, the null distribution permutes sources (all students at once), and the interval counts
sources. Naive tests over cells call 9–27 % of unrelated proxies significant.

Contamination of a corpus by task questions is the 13-gram check of GPT-3 (appendix C of arXiv:2005.14165).
"""

import hashlib
import itertools
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import scipy

from jax_selftrain import evals, hub, likelihood
from jax_selftrain.config import ScoreConfig
from jax_selftrain.corpus import Corpus, open_corpus
from jax_selftrain.corpus.word_ngrams import NgramIndex
from jax_selftrain.evals.task_names import split_names
from jax_selftrain.io import atomic
from jax_selftrain.io.rng import make_rng
from jax_selftrain.stats.noninferiority import ALPHA, benjamini_hochberg
from jax_selftrain.study.measure_names import Cells

NGRAM_LENGTH = 13
MISSING = 0.3
"""Bound of the 90 % interval of a correlation that is called absent."""
SOURCES_FOR_ABSENCE = 32
"""Sources from which the interval of a correlation of zero is inside the bound."""
PERMUTATIONS = 5_040
"""Number of permutations: all for up to seven sources, else random ones."""

CONFIRMED, REJECTED, INCONCLUSIVE = "related", "unrelated", "cannot tell"


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
    """Return every question of the task files with its right answer."""
    return [
        question.context + question.continuations[question.answer]
        for task in evals.load_tasks(split_names(score.tasks)[0], score.limit)
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
    index = NgramIndex.build({str(number): [question] for number, question in enumerate(questions)}, NGRAM_LENGTH)
    long_enough, found, remaining = len(np.unique(index.members[:, 1])), np.zeros(0, np.int64), iter(texts)
    while long_enough and (batch := list(itertools.islice(remaining, 1024))):
        _, ngrams = index.find(pa.array(batch, pa.string()))
        found = np.union1d(found, index.list_groups(ngrams)[1])
    return {"questions": long_enough, "found": len(found), "too_short": len(questions) - long_enough}


def judge_relations(
    proxies: Mapping[str, np.ndarray],
    effects: np.ndarray,
    base_ability: np.ndarray | None = None,
    *,
    self_mask: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Judge the relation of each proxy to the gain.

    Args:
        proxies: by name, [students, sources]; NaN where missing.
        effects: change of capability in every cell [seeds, students, sources].
        base_ability: ability of each source before training [sources]; None: nothing is partialled out.
        self_mask: cells of a student with its own text, bool [students, sources].

    Returns per proxy: `correlation`, `p` and `p_adjusted`, `partial` and `p_partial`, `without_own` and its p, the 90 %
    interval `low`, `high`, the `verdict` with its `reason`, the mean `regret` of choosing each student's source by the
    proxy, and `random_regret` of a random choice. Undefined numbers are None.
    """
    mean = effects.mean(axis=0)
    found: list[dict[str, Any]] = []
    for name, values in proxies.items():
        whole = _permutation_test(values, mean)
        partial = whole if base_ability is None else _permutation_test(values, mean, base_ability)
        others: tuple[float | None, float | None] = None, None
        if self_mask is not None:  # an own gain would spoil the null distribution of the other cells
            others = _permutation_test(np.where(self_mask, np.nan, values), np.where(self_mask, np.nan, mean))
        columns = {
            ("correlation", "p"): whole,
            ("partial", "p_partial"): partial,
            ("without_own", "p_without_own"): others,
            ("low", "high"): _interval(whole[0], mean.shape[1]),
            ("regret", "random_regret"): _selection_regret(values, mean),
        }
        cells = int(np.sum(np.isfinite(values) & np.isfinite(mean)))
        found.append({"name": name, "cells": cells, "sources": mean.shape[1], "p_adjusted": None})
        for keys, pair in columns.items():
            found[-1] |= zip(keys, pair, strict=True)
    testable = [one for one in found if one["p"] is not None]
    for one, adjusted in zip(testable, benjamini_hochberg([one["p"] for one in testable]), strict=True):
        one["p_adjusted"] = adjusted
    for one in found:
        one["verdict"], one["reason"] = _judge(one, has_own=self_mask is not None and bool(self_mask.any()))
    return found


def reliability(gains: np.ndarray) -> float | None:
    """Estimate the reliability of the seed-averaged gains (Spearman–Brown).

    Args:
        gains: [seeds, students, sources].

    Returns the reliability, from the mean correlation between seeds of gains centered within students. None for one
    seed or constant gains.
    """
    flat = (gains - gains.mean(axis=2, keepdims=True)).reshape(len(gains), -1)
    if len(flat) < 2 or not np.all(flat.std(axis=1) > 0):
        return None
    between = np.corrcoef(flat)[np.triu_indices(len(flat), 1)].mean()
    return float(len(flat) * between / (1 + (len(flat) - 1) * between)) if between > 0 else 0.0


def _permutation_test(
    proxy: np.ndarray, gain: np.ndarray, strength: np.ndarray | None = None
) -> tuple[float | None, float | None]:
    """Return the rank correlation within students and its permutation p-value.

    With `strength`, the ranks of both are residualized, and the residuals of the gain are permuted (Freedman and Lane).
    """
    sources = gain.shape[1]
    if sources < 3:
        return None, None
    known = np.isfinite(proxy) & np.isfinite(gain)
    orders = _orders(sources)
    if strength is None:
        permuted = np.moveaxis(gain[:, orders], 1, 0)
        valid = np.isfinite(proxy) & np.isfinite(permuted)
        r = _correlation(_centered_ranks(proxy, valid), _centered_ranks(permuted, valid))
    else:
        one, rest, held = (
            _centered_ranks(np.broadcast_to(values, gain.shape), known) for values in (proxy, gain, strength)
        )
        one, rest = _residualize(one, held), _residualize(rest, held)
        r = _correlation(one, _residualize(np.where(known, np.moveaxis(rest[:, orders], 1, 0), 0.0), held))
    if not np.isfinite(r[0]):
        return None, None
    reached = np.abs(r[np.isfinite(r)]) >= abs(r[0]) - 1e-9
    return float(r[0]), float(reached.mean())


def _orders(sources: int) -> np.ndarray:
    """Return permutations of the sources [P, sources], the identity first."""
    if math.factorial(sources) <= PERMUTATIONS:
        return np.array([*itertools.permutations(range(sources))])
    rng = make_rng("permutations of sources", sources)
    drawn = rng.permuted(np.tile(np.arange(sources), (PERMUTATIONS - 1, 1)), axis=1)
    return np.concatenate([np.arange(sources)[None], drawn])


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Correlate centered ranks over the last two axes."""
    squares = np.sum(one**2, axis=(-2, -1)) * np.sum(other**2, axis=(-2, -1))
    defined = squares > 1e-9
    product = np.sum(one * other, axis=(-2, -1))
    return np.where(defined, product / np.sqrt(np.where(defined, squares, 1.0)), np.nan)


def _residualize(ranks: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Subtract the regression of centered ranks on others."""
    size = float(np.sum(held**2))
    return ranks - held * (np.sum(ranks * held, axis=(-2, -1), keepdims=True) / size) if size else ranks


def _centered_ranks(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return mid-ranks among valid values minus their mean [… sources]; 0 elsewhere."""
    ranks = scipy.stats.rankdata(np.where(valid, values, np.inf), axis=-1)
    return np.where(valid, ranks - (valid.sum(axis=-1, keepdims=True) + 1) / 2, 0.0)


def _interval(r: float | None, sources: int) -> tuple[float | None, float | None]:
    """Return the 90 % interval of a correlation by Fisher's z."""
    if r is None or sources < 4:
        return None, None
    center = math.atanh(max(-1 + 1e-9, min(1 - 1e-9, r)))
    half = float(scipy.stats.norm.ppf(0.95)) / math.sqrt(sources - 3)
    return math.tanh(center - half), math.tanh(center + half)


def _selection_regret(promise: np.ndarray, gain: np.ndarray) -> tuple[float | None, float | None]:
    """Return the mean regret of choosing by the proxy, and at random."""
    known = np.isfinite(promise) & np.isfinite(gain)
    rows = [(p[members], g[members]) for p, g, members in zip(promise, gain, known, strict=True) if members.any()]
    if not rows:
        return None, None
    regret, random = zip(*((g.max() - g[np.argmax(p)], g.max() - g.mean()) for p, g in rows), strict=True)
    return float(np.mean(regret)), float(np.mean(random))


def _judge(one: Mapping[str, Any], *, has_own: bool) -> tuple[str, str]:
    if one["p_adjusted"] is None:
        return INCONCLUSIVE, "there are fewer than three sources, or nothing varies."
    if one["p_adjusted"] <= ALPHA:
        problems = {
            "it correlates negatively with the gain.": one["correlation"] < 0,
            "it correlates with the gain, but so does the base ability of the sources.": not _is_small(
                one["p_partial"]
            ),
            "without the students' own texts it does not correlate with the gain.": has_own
            and not (_is_small(one["p_without_own"]) and one["without_own"] > 0),
        }
        for problem, is_present in problems.items():
            if is_present:
                return INCONCLUSIVE, problem
        return (
            CONFIRMED,
            "it correlates with the gain, also without own texts and at equal base ability of the sources.",
        )
    if one["low"] is not None and one["low"] > -MISSING and one["high"] < MISSING:
        return REJECTED, f"the 90 % interval is inside ±{MISSING:g}."
    return INCONCLUSIVE, f"{one['sources']} sources are too few for this correlation."


def _is_small(p: float | None) -> bool:
    return p is not None and p <= ALPHA


def cell_array(cells: Cells, students: Sequence[str], sources: Sequence[str], *path: str) -> np.ndarray:
    """Return a number of every cell [seeds, students, sources], or NaN."""
    found = {(cell["seed"], cell["student"], cell["source"]): reduce(getitem, path, cell) for cell in cells}
    seeds = dict.fromkeys(cell["seed"] for cell in cells)
    return np.array(
        [[[found.get((seed, student, source)) for source in sources] for student in students] for seed in seeds],
        np.float64,
    )
