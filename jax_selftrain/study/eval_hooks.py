"""Evaluation during training: a training hook that scores the model in memory.

Training and likelihood scoring do not import each other; they meet here. The files of `eval_texts`, `eval_tasks` and
`eval_sequences` are read, checked and tokenized once, before training. Metrics are named by the file's stem:
`NAME/nll` of a text file (nats per token), `NAME/acc` of a task file, and of an extraction set `NAME/exact_match`
(share of suffixes that greedy decoding reproduces), `NAME/log_pz` (mean log-probability of the suffix, nats) and
`NAME/pz` (mean probability).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain import evals, hub, likelihood, training
from jax_selftrain.config import ExtractConfig, ScoreConfig, TrainConfig, yaml_io
from jax_selftrain.evals.task_names import split_names
from jax_selftrain.hub import LoadedModel
from jax_selftrain.io.manifest import hash_json
from jax_selftrain.training import Hook

METRICS = {"nll": "texts", "acc": "tasks", "exact_match": "sequences", "log_pz": "sequences", "pz": "sequences"}
"""Kind of file of each metric."""


def train_with_evals(config: TrainConfig, *, hooks: Sequence[Hook] = ()) -> Path:
    """Train a model on a corpus, with the evaluations of `config`."""
    return training.train(config, hooks=[*evaluation_hooks(config), *hooks])


def evaluation_hooks(config: TrainConfig) -> list[Hook]:
    """Return the evaluation hook; an empty list without evaluation.

    Raises InputError if options conflict, or a file cannot be read or does not fit the model.
    """
    yaml_io.require(config, "model")
    training.check_train_config(config)
    if not (config.eval_texts or config.eval_tasks or config.eval_sequences):
        return []
    tasks, texts = (
        [evals.select_split(task, config.eval_split) for task in load(files, config.eval_limit)]
        for load, files in ((evals.load_tasks, config.eval_tasks), (evals.load_texts, config.eval_texts))
    )
    evals.paths_by_name([*tasks, *texts])
    requests = evals.build_requests(hub.open_model(config.model), [*tasks, *texts])
    sequences = _load_sequences(config)

    lengths = {"prefix": config.eval_prefix, "suffix": config.eval_suffix}
    measured: dict[str, dict[str, Any]] = {
        "texts": {text.name: {"n": len(text.documents), "fingerprint": hash_json(text.documents)} for text in texts},
        "tasks": {
            task.name: {"n": len(task.questions), "fingerprint": hash_json([task.kind, *map(asdict, task.questions)])}
            for task in tasks
        },
        "sequences": {
            name: {"n": len(rows), **lengths, "fingerprint": hashlib.sha256(rows.tobytes()).hexdigest()}
            for name, rows in sequences.items()
        },
    }
    metrics = {f"{name}/{metric}": (kind, name, metric) for metric, kind in METRICS.items() for name in measured[kind]}

    def measure(step: int, model: LoadedModel) -> dict[str, float]:
        model = replace(model, compute_dtype=np.dtype(config.dtype))
        scored, _ = evals.score_requests(requests, partial(likelihood.loglikelihoods, model))
        scored["sequences"] = {}
        for name, rows in sequences.items():
            forced = evals.extraction_metrics(model, rows, config.eval_prefix, greedy_decode=False)
            exact, log_pz = forced["exact_match"], forced["logprob"]
            means = {"exact_match": exact.mean(), "log_pz": log_pz.mean(), "pz": np.exp(log_pz).mean()}
            scored["sequences"][name] = means
        return {label: float(scored[kind][name][metric]) for label, (kind, name, metric) in metrics.items()}

    at: dict[str, Any] = {
        "every": config.eval_every,
        "each_epoch": config.eval_every is None,
        "run_at_start_and_end": True,
    }
    return [Hook(measure, metric_names=tuple(metrics), measured=measured, **at)]


def with_default_evals(train: TrainConfig, score: ScoreConfig, extract: ExtractConfig) -> TrainConfig:
    """Fill in the files of `score` and `extract` if `train` names none."""
    is_evaluated = train.eval_every is not None or train.epochs is not None
    if not is_evaluated or train.eval_texts or train.eval_tasks or train.eval_sequences:
        return train
    window = evals.make_window(extract)
    return replace(
        train,
        eval_texts=score.texts,
        eval_tasks=tuple(split_names(score.tasks)[0]),
        eval_sequences=extract.sequences,
        eval_prefix=window.prefix,
        eval_suffix=window.suffix,
    )


def summarize_curve(
    curve: Sequence[Mapping[str, float]], measured: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Summarize `curve.jsonl` and `evaluation.measured` of `run.json`; None without lines.

    Returns `step`, and `measures`: each with `name`, `n` (documents, questions or sequences) and `values`, one a step.
    """
    if not curve:
        return None
    sizes = {
        f"{name}/{metric}": entry["n"]
        for files in measured
        for metric, kind in METRICS.items()
        for name, entry in files.get(kind, {}).items()
    }
    measures = [
        {"name": name, "n": sizes[name], "values": [line[name] for line in curve]}
        for name in curve[0]
        if name != "step"
    ]
    return {"step": [line["step"] for line in curve], "measures": measures}


def _load_sequences(config: TrainConfig) -> dict[str, np.ndarray]:
    """Return int32 [N, prefix + suffix] by name; at most one set."""
    if not config.eval_sequences:
        return {}
    options = ExtractConfig(
        model=config.model,
        sequences=config.eval_sequences,
        prefix=config.eval_prefix,
        suffix=config.eval_suffix,
        limit=config.eval_limit,
    )
    return {Path(config.eval_sequences).stem: evals.load_extraction_sets(options)[0].tokens}
