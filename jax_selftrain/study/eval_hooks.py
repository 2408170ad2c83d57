"""Evaluation during training: a training hook that scores the model in memory.

Training and likelihood scoring do not import each other; they meet here. The files of `eval_texts`, `eval_tasks` and
`eval_sequences` are read, checked and tokenized once, before training.

| file | metrics | unit |
|---|---|---|
| text file | `NAME/nll` | nats per token |
| task file | `NAME/acc` | share of questions answered correctly |
| extraction set | `NAME/exact_match` | share of suffixes that greedy decoding reproduces |
| | `NAME/log_pz`, `NAME/pz` | mean log-probability (nats), mean probability of the suffix |

NAME is the file's stem.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain import evals, hub, training
from jax_selftrain.config import ExtractConfig, ScoreConfig, TrainConfig, yaml_io
from jax_selftrain.errors import InputError
from jax_selftrain.hub import LoadedModel
from jax_selftrain.io.manifest import hash_json
from jax_selftrain.models import DecoderConfig
from jax_selftrain.training import Hook


def train_with_evals(config: TrainConfig, *, hooks: Sequence[Hook] = ()) -> Path:
    """Train a model on a corpus, with evaluation if `config.eval_every` is set."""
    return training.train(config, hooks=[*evaluation_hooks(config), *hooks])


def evaluation_hooks(config: TrainConfig) -> list[Hook]:
    """Return the evaluation hook; an empty list without `eval_every`.

    Raises:
      InputError: options conflict, or a file cannot be read or does not fit the model.
    """
    yaml_io.require(config, "model")
    training.check_train_config(config)
    if config.eval_every is None:
        return []
    suite = _load_suite(config)
    return [
        Hook(
            function=suite.measure,
            every=config.eval_every,
            run_at_start_and_end=True,
            metric_names=suite.names(),
            measured=suite.describe(),
        )
    ]


def with_default_evals(train: TrainConfig, score: ScoreConfig, extract: ExtractConfig) -> TrainConfig:
    """Fill in the files of `score` and `extract` if `train` names none."""
    if train.eval_every is None or train.eval_texts or train.eval_tasks or train.eval_sequences:
        return train
    window = evals.make_window(extract)
    return replace(
        train,
        eval_texts=score.texts,
        eval_tasks=score.tasks,
        eval_sequences=extract.sequences,
        eval_prefix=window.prefix,
        eval_suffix=window.suffix,
    )


@dataclass(frozen=True)
class _EvalSuite:
    """Tokenized tasks, texts and sequences."""

    tasks: Sequence[evals.Task]
    texts: Sequence[evals.TextFile]
    prepared: evals.RequestSet
    sequences: Mapping[str, np.ndarray]
    """int32 [N, prefix + suffix] by name; at most one set."""
    prefix: int
    dtype: np.dtype
    """Dtype of the matmul operands, as in training."""

    def names(self) -> tuple[str, ...]:
        """Return the names of all metrics."""
        return (
            *(f"{text.name}/nll" for text in self.texts),
            *(f"{task.name}/acc" for task in self.tasks),
            *(f"{name}/{measure}" for name in self.sequences for measure in ("exact_match", "log_pz", "pz")),
        )

    def describe(self) -> dict[str, Any]:
        """Return sizes and fingerprints of texts, tasks and sequences."""
        return {
            "texts": {
                text.name: {"n": len(text.documents), "fingerprint": hash_json(text.documents)} for text in self.texts
            },
            "tasks": {
                task.name: {
                    "n": len(task.questions),
                    "fingerprint": hash_json([task.kind, *map(asdict, task.questions)]),
                }
                for task in self.tasks
            },
            "sequences": {
                name: {
                    "n": len(rows),
                    "prefix": self.prefix,
                    "suffix": rows.shape[1] - self.prefix,
                    "fingerprint": hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest(),
                }
                for name, rows in self.sequences.items()
            },
        }

    def measure(self, step: int, model: LoadedModel) -> dict[str, float]:
        """Return all metrics of a model, in the order of `names`."""
        model = replace(model, compute_dtype=self.dtype)
        found = evals.score_requests(model, self.prepared)
        measures = {f"{text.name}/nll": found.texts[text.name]["nll"] for text in self.texts}
        measures |= {f"{task.name}/acc": found.tasks[task.name]["acc"] for task in self.tasks}
        for name, rows in self.sequences.items():
            forced = evals.extraction_metrics(model, rows, self.prefix, greedy_decode=False)
            measures[f"{name}/exact_match"] = float(forced["exact_match"].mean())
            measures[f"{name}/log_pz"] = float(forced["logprob"].mean())
            measures[f"{name}/pz"] = float(np.exp(forced["logprob"]).mean())
        return measures


def _load_suite(config: TrainConfig) -> _EvalSuite:
    decoder = hub.open_model(config.model).config
    tasks = evals.load_tasks(config.eval_tasks, config.eval_limit)
    texts = evals.load_texts(config.eval_texts, config.eval_limit)
    evals.paths_by_name(tasks, texts)
    prepared = evals.RequestSet()
    if tasks or texts:
        prepared = evals.build_requests(hub.open_model(config.model), tasks, texts)
    return _EvalSuite(
        tasks, texts, prepared, _load_sequences(config, decoder), config.eval_prefix, np.dtype(config.dtype)
    )


def _load_sequences(config: TrainConfig, decoder: DecoderConfig) -> dict[str, np.ndarray]:
    if not config.eval_sequences:
        return {}
    window = evals.PromptWindow(config.eval_prefix, config.eval_suffix)
    if window.length > decoder.max_positions:
        raise InputError(
            f"--eval-prefix {config.eval_prefix} + --eval-suffix {config.eval_suffix} is longer than the "
            f"{decoder.max_positions} positions of {config.model}; shorten one of them"
        )
    path = Path(config.eval_sequences)
    rows = evals.load_sequences(
        path,
        window,
        vocab_size=decoder.vocab_size,
        limit=config.eval_limit,
        tokenizer=lambda: hub.open_model(config.model).tokenizer,
    )
    return {path.stem: rows.tokens}
