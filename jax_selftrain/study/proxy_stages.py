"""Stages that measure the proxies of a corpus."""

from dataclasses import replace
from typing import Any, NamedTuple

from jax_selftrain import hub
from jax_selftrain.config import ArmConfig, ScoreConfig, fill_options
from jax_selftrain.study.dag import Stage
from jax_selftrain.study.proxies import corpus_likelihood, corpus_proxies
from jax_selftrain.study.stage_factory import StageFactory
from jax_selftrain.study.study_model import StudyModel


class ProxyStages(NamedTuple):
    """Measurements of a corpus before training."""

    student: Stage
    """The corpus under the student."""
    source: Stage
    """The corpus under its source."""
    texts_before: Stage | None = None
    """Texts under the student."""
    texts_after: Stage | None = None
    """Texts under the student after `proxy_steps`."""


def make_proxy_stages(
    stages: StageFactory, student: StudyModel, corpus: Stage, source: StudyModel, seed: int
) -> ProxyStages | None:
    """Make the stages of the corpus of a main cell.

    None without `proxy_sample_size`.
    """
    if stages.config.proxy_sample_size == 0:
        return None
    sampled = stages.sample(source, ArmConfig(), seed)
    found = ProxyStages(measure_student(stages, student, corpus), _measure_source(stages, source, sampled))
    if not stages.config.proxy_steps:
        return found
    trained = stages.train(student, [corpus], ArmConfig("a few steps"), seed, stages.config.proxy_steps)
    texts = replace(stages.config.score, tasks=(), limit=None, num_fewshot=None, task_folder="")
    before, after = (
        replace(stages.score(model, texts), label=f"score texts under {model.label}") for model in (student, trained)
    )
    return found._replace(texts_before=before, texts_after=after)


def measure_student(stages: StageFactory, student: StudyModel, corpus: Stage) -> Stage:
    """Measure the proxies of a corpus under a student before training."""
    config = stages.config
    score = fill_options(config, config.score, student.ref, student.options)
    train = fill_options(config, config.train, student.ref, student.options) if score.texts else None
    identity = _make_identity(stages, score) | {"limit": score.limit, "by_task": True}
    inputs = {f"task {n}": stages.hashes.reference(path) for n, path in enumerate(score.tasks)}
    if train is not None:
        inputs |= {f"text {n}": stages.hashes.texts(one, score.text_limit) for n, one in enumerate(score.texts)}
        identity |= {name: getattr(score, name) for name in ("text_limit", "text_max_tokens")}
        identity |= {f"train_{name}": getattr(train, name) for name in ("seq_len", "dtype")}
    if embedder := config.embedding_model:
        opened = hub.open_model(embedder)
        inputs |= {"embedder": opened.fingerprint, "embedder_tokenizer": opened.tokenizer_fingerprint}
    documents = config.proxy_sample_size
    return Stage(
        "proxies",
        f"proxies under {student.label}: {corpus.label}",
        identity,
        {"corpus": corpus, **student.inputs, **inputs},
        lambda out: corpus_proxies(
            stages.read_corpus(corpus), score, out, documents, train=train, embedding_model=embedder
        ),
        needs_devices=True,
    )


def _measure_source(stages: StageFactory, source: StudyModel, corpus: Stage) -> Stage:
    score = fill_options(stages.config, stages.config.score, source.ref, source.options)
    documents = stages.config.proxy_sample_size
    return Stage(
        "proxies",
        f"log-likelihood under {source.label}: {corpus.label}",
        _make_identity(stages, score),
        {"corpus": corpus, **source.inputs},
        lambda out: corpus_likelihood(stages.read_corpus(corpus), score, out, documents),
        needs_devices=True,
    )


def _make_identity(stages: StageFactory, score: ScoreConfig) -> dict[str, Any]:
    return {"documents": stages.config.proxy_sample_size, "dtype": score.dtype}
