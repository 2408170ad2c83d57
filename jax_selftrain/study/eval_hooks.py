"""Evaluation during training: a training hook that scores the model in memory.

Training and likelihood scoring do not import each other; they meet here. The files of `eval_texts`, `eval_tasks` and
`eval_sequences` are read, checked and tokenized once, before training. Metrics are named by the file's stem:
`NAME/nll` of a text file (nats per token), `NAME/acc` of a task file, and of an extraction set `NAME/exact_match`
(share of suffixes that greedy decoding reproduces), `NAME/log_pz` (mean log-probability of the suffix, nats) and
`NAME/pz` (mean probability). Exact match and p_z are also measured by overlap class (`NAME/exact_match/held_out`,
`partial`, `seen`) and for the held-out sequences that the model reproduces before the first update
(`reproduced_held_out`); a class without sequences has no metrics.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_selftrain import evals, hub, likelihood, training
from jax_selftrain.config import ExtractConfig, ScoreConfig, TrainConfig, yaml_io
from jax_selftrain.corpus import open_corpus, parse_mixture
from jax_selftrain.errors import InputError
from jax_selftrain.evals.extraction import CLASSES
from jax_selftrain.evals.task_names import split_names
from jax_selftrain.hub import LoadedModel
from jax_selftrain.io import json_files
from jax_selftrain.io.json_files import hash_json
from jax_selftrain.study.measure_names import REPRODUCED
from jax_selftrain.training import Hook

METRICS = {"nll": "texts", "acc": "tasks", "exact_match": "sequences", "log_pz": "sequences", "pz": "sequences"}
"""Kind of file of each metric."""
REPRODUCED_FILE = "reproduced_held_out.json"
"""Held-out sequences that the model of step 0 reproduces, as their numbers; for resumed runs."""


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
    classes = {name: _classify_sequences(config, rows) for name, rows in sequences.items()}

    lengths = {"prefix": config.eval_prefix, "suffix": config.eval_suffix}
    measured: dict[str, dict[str, Any]] = {
        "texts": {text.name: {"n": len(text.documents), "fingerprint": hash_json(text.documents)} for text in texts},
        "tasks": {
            task.name: {"n": len(task.questions), "fingerprint": hash_json([task.kind, *map(asdict, task.questions)])}
            for task in tasks
        },
        "sequences": {
            name: {
                "n": len(rows),
                **lengths,
                "classes": {part: int(members.sum()) for part, members in classes[name].items()},
                "fingerprint": hashlib.sha256(rows.tobytes()).hexdigest(),
            }
            for name, rows in sequences.items()
        },
    }
    metrics = {f"{name}/{metric}": (kind, name, metric) for metric, kind in METRICS.items() for name in measured[kind]}

    def measure(step: int, model: LoadedModel) -> dict[str, float]:
        model = replace(model, compute_dtype=np.dtype(config.dtype))
        scored, _ = evals.score_requests(requests, partial(likelihood.loglikelihoods, model))
        scored["sequences"] = {}
        by_class: dict[str, float] = {}
        for name, rows in sequences.items():
            forced = evals.extraction_metrics(model, rows, config.eval_prefix, greedy_decode=False)
            exact, log_pz = forced["exact_match"], forced["logprob"]
            values = {"exact_match": exact, "log_pz": log_pz, "pz": np.exp(log_pz)}
            scored["sequences"][name] = {metric: array.mean() for metric, array in values.items()}
            parts = dict(classes[name])
            if parts:
                parts[REPRODUCED] = _find_reproduced(Path(config.out), step, exact, parts["held_out"])
            by_class |= {
                f"{name}/{metric}/{part}": float(values[metric][members].mean())
                for metric in ("exact_match", "pz")
                for part, members in parts.items()
                if members.any()
            }
        found = {label: float(scored[kind][name][metric]) for label, (kind, name, metric) in metrics.items()}
        return found | by_class

    at: dict[str, Any] = {
        "every": config.eval_every,
        "each_epoch": config.eval_every is None,
        "run_at_start_and_end": True,
    }
    return [Hook(measure, metric_names=tuple(metrics), measured=measured, **at)]


def with_default_evals(train: TrainConfig, score: ScoreConfig, extract: ExtractConfig) -> TrainConfig:
    """Fill in the files and the limit of `score` and `extract`.

    Sequences selected by `column` or `subsample` are not measured: `TrainConfig` has no such options.
    """
    is_evaluated = train.eval_every is not None or train.epochs is not None
    if not is_evaluated or train.eval_texts or train.eval_tasks or train.eval_sequences:
        return train
    window = evals.make_window(extract)
    return replace(
        train,
        eval_texts=score.texts,
        eval_tasks=tuple(split_names(score.tasks)[0]),
        eval_sequences="" if extract.column or extract.subsample else extract.sequences,
        eval_prefix=window.prefix,
        eval_suffix=window.suffix,
        eval_min_overlap=extract.min_overlap,
        eval_limit=score.limit if train.eval_limit is None else train.eval_limit,
    )


def summarize_curve(run: Path, measured: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Summarize the curve of a run; None without lines.

    `measured` is `evaluation.measured` of its `run.json`.

    Returns `step`, and `measures`: each with `name`, `n` (documents, questions or sequences) and `values`, one a step.
    """
    curve = training.read_curve(run)
    if not curve:
        return None
    sizes = {
        f"{name}/{metric}": entry["n"]
        for files in measured
        for metric, kind in METRICS.items()
        for name, entry in files.get(kind, {}).items()
    }
    for name, entry in ((name, entry) for files in measured for name, entry in files.get("sequences", {}).items()):
        classes = dict(entry.get("classes", {}))
        if classes:
            classes[REPRODUCED] = len(_read_reproduced(run / REPRODUCED_FILE))
        sizes |= {f"{name}/{metric}/{part}": n for metric in ("exact_match", "pz") for part, n in classes.items()}
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


def _classify_sequences(config: TrainConfig, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return members, bool [N], of each class; nothing without a corpus."""
    if not config.corpus:
        return {}
    folders = [config.corpus, *(folder for folder, _ in parse_mixture(config.mixture))]
    suffixes, min_overlap = rows[:, config.eval_prefix :], config.eval_min_overlap
    lengths, _, _ = evals.corpus_overlap([open_corpus(one) for one in folders], config.model, suffixes, min_overlap)
    classes = evals.classify(lengths, config.eval_suffix, min_overlap)
    return {name: classes == name for name in CLASSES}


def _find_reproduced(run: Path, step: int, exact: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Return held-out sequences that the model of step 0 reproduces.

    The result is bool [N]. Step 0 writes them to the run folder, where later steps read them.
    """
    members, path = held_out & exact.astype(bool), run / REPRODUCED_FILE
    if step:
        members = np.zeros(len(exact), bool)
        members[_read_reproduced(path)] = True
    elif jax.process_index() == 0:
        json_files.write_json(path, {"sequences": np.flatnonzero(members).tolist()})
    return members


def _read_reproduced(path: Path) -> list[int]:
    """Read the sequences that the model of step 0 reproduces."""
    content = json_files.read_json(path)
    if not isinstance(content, dict) or content.keys() != {"sequences"}:
        raise InputError(f"{path}: does not list sequences, so it is damaged; train again into another folder")
    return content["sequences"]
