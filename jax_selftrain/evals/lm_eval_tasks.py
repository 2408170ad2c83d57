"""Tasks of lm-evaluation-harness by name.

A value of `--tasks` that is neither a file nor a folder is the name of a task, group or tag of the harness, or of one
of our suites. The harness builds the requests and computes the metrics; `lm_eval_adapter` scores the requests. The
harness is imported only for a name, so local files can be scored without it.
"""

from __future__ import annotations

import math
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from jax_selftrain import hub
from jax_selftrain.config import yaml_io
from jax_selftrain.errors import InputError
from jax_selftrain.evals.lm_eval_items import items_from_answers
from jax_selftrain.io.manifest import hash_json

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

    from jax_selftrain.evals.lm_eval_adapter import AnsweredInstance, LoglikelihoodFn

SUITES: dict[str, tuple[str, ...]] = {
    "pythia": ("lambada_openai", "piqa", "winogrande", "wsc", "arc_easy", "arc_challenge", "sciq", "logiqa"),
    "quick": ("lambada_openai", "sciq", "arc_easy", "piqa"),
    "blimp": ("blimp",),
}
"""Our suites: Pythia's published tasks, tasks with signal at small sizes, the 67 sets of BLiMP."""

BOOTSTRAPS = 1000
"""Bootstrap resamples for the standard error of perplexity and F1; the error of a standard error is 2 %. The harness
takes 100,000 (0.2 %) in forked processes, which JAX's threads do not survive."""

_SEED, _FEWSHOT_SEED = 0, 1234
"""Seeds of the harness: of Python's `random`; of numpy and few-shot examples."""


@dataclass(frozen=True)
class LmEvalTasks:
    """Tasks of the harness with their data."""

    loaded: TaskDict
    version: str
    """Version of lm-eval."""


@dataclass(frozen=True)
class HarnessEvaluation:
    """Results of the harness."""

    tasks: dict[str, dict[str, Any]]
    """By task: metrics with their standard errors, and `n`."""
    groups: dict[str, dict[str, Any]]
    """The same by group."""
    provenance: dict[str, Any]
    """`version` of the harness; by task its `version`, `num_fewshot` and `requests`, a hash of all requests."""
    rows: list[dict[str, Any]]
    """Rows of `score.REQUESTS`, in task, document, choice order."""
    items: pa.Table
    """Table `item_results.ITEMS`."""
    generations: pa.Table
    """Table `GENERATIONS`; empty without generation tasks."""


GENERATIONS = pa.schema([("task", pa.string()), ("doc", pa.int64()), ("choice", pa.int32()), ("text", pa.string())])
"""One row per generated text; `choice` numbers the repeats of a request."""


def split_names(references: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the values of `--tasks` into paths and names; expand suites."""
    files = [reference for reference in references if not _is_name(reference)]
    names = [name for reference in references if _is_name(reference) for name in SUITES.get(reference, (reference,))]
    return files, list(dict.fromkeys(names))


def load_lm_eval_tasks(
    names: Sequence[str], reserved_names: Collection[str] = (), *, folder: str = "", num_fewshot: int | None = None
) -> LmEvalTasks:
    """Load tasks and their data with `datasets`.

    Args:
      names: tasks, groups or tags of the harness, or of `folder`.
      reserved_names: names that no task may have.
      folder: YAML files of more tasks, which override tasks of the harness.
      num_fewshot: number of few-shot examples; None: the task's value, else 0. A task with the value 0 keeps it.

    Raises:
      InputError: lm-eval or a package of a task is missing, a name is unknown or reserved, or data are unavailable.
    """
    import_module("jax_selftrain.evals.lm_eval_adapter")  # raises InputError if lm-eval is not installed
    if folder and not Path(folder).is_dir():
        raise InputError(f"--task-folder {folder}: no such folder; give the one that holds the task files (*.yaml)")
    manager = _manager_for(names, folder)
    _set_seeds()
    loaded = _load(manager, names)
    for name, task in loaded["tasks"].items():
        if name in reserved_names:
            raise InputError(
                f"a file to score and a task of lm-evaluation-harness are both named {name!r}; rename the file"
            )
        if getattr(task, "MULTIMODAL", False):
            raise InputError(f"task {name} has images or audio, which language models cannot read")
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(f"task {name} executes code from a model, which is not supported")
        default = task.get_config("num_fewshot")
        if default is None or (num_fewshot is not None and default != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return LmEvalTasks(loaded, metadata.version("lm_eval"))


def evaluate_tasks(
    model: hub.LoadedModel,
    tasks: LmEvalTasks,
    *,
    limit: int | None = None,
    batch_tokens: int | None = None,
    loglikelihood_fn: LoglikelihoodFn | None = None,
) -> HarnessEvaluation:
    """Evaluate a model in memory on tasks of the harness.

    Args:
      model: with a tokenizer.
      tasks: from `load_lm_eval_tasks`. They store their requests, so load them again for another model.
      limit: maximum number of documents of each task.
      batch_tokens: token positions in one device batch; None: the engine's default.
      loglikelihood_fn: replaces `likelihood.loglikelihoods`.

    Raises:
      InputError: a request does not fit the model, or its log-likelihood is not a finite number.
    """
    from lm_eval.evaluator import evaluate

    from jax_selftrain.evals.lm_eval_adapter import HarnessLM

    lm = HarnessLM(model, batch_tokens=batch_tokens, loglikelihood_fn=loglikelihood_fn)
    lm.answered = []
    _set_seeds()
    with _disable_multiprocessing(), redirect_stdout(sys.stderr):  # the harness prints its progress to stdout
        results = evaluate(lm, tasks.loaded, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=True)
    if results is None:
        raise AssertionError("the harness returns results on rank 0, which is the only one")
    order = {name: i for i, name in enumerate(tasks.loaded["tasks"])}
    answered = sorted(lm.answered, key=lambda a: (order[a.instance.task_name], a.instance.doc_id, a.instance.idx))
    requests: dict[str, list[Any]] = {name: [] for name in order}
    for answer in answered:
        requests[answer.instance.task_name].append(answer.instance.args)
    metrics = {name: _metrics(values) for name, values in results["results"].items()}
    return HarnessEvaluation(
        tasks={name: metrics[name] for name in order},
        groups={name: _metrics(values) for name, values in results.get("groups", {}).items()},
        provenance={
            "version": tasks.version,
            "tasks": {
                name: {
                    "version": results["versions"].get(name),
                    "num_fewshot": results["n-shot"].get(name),
                    "requests": hash_json(requests[name]),
                }
                for name in order
            },
        },
        rows=list(_likelihood_rows(answered)),
        items=items_from_answers(tasks.loaded["tasks"], answered, results["samples"]),
        generations=pa.Table.from_pylist(list(_generation_rows(answered)), schema=GENERATIONS),
    )


def _likelihood_rows(answered: Sequence[AnsweredInstance]) -> Iterator[dict[str, Any]]:
    previous = None
    for instance, likelihoods, _ in answered:
        is_rolling = instance.request_type == "loglikelihood_rolling"
        if instance is not previous:  # a repeated request has one likelihood
            for i, likelihood in enumerate(likelihoods):
                choice = i if is_rolling else instance.idx
                yield {"task": instance.task_name, "doc": instance.doc_id, "choice": choice, **likelihood._asdict()}
        previous = instance


def _generation_rows(answered: Sequence[AnsweredInstance]) -> Iterator[dict[str, Any]]:
    repeats: Counter[tuple[str, int]] = Counter()
    for instance, _, text in answered:
        if text is not None:
            key = instance.task_name, instance.doc_id
            yield {"task": key[0], "doc": key[1], "choice": repeats[key], "text": text}
            repeats[key] += 1


def _is_name(reference: str) -> bool:
    """Return True if a reference does not look like a path."""
    return re.fullmatch(r"[^/:]+", reference) is not None and not (
        Path(reference).exists() or Path(reference).suffix in _FILES
    )


_FILES = (".jsonl", ".json", ".yaml", ".yml", ".lst", ".parquet")


def _manager_for(names: Sequence[str], folder: str) -> TaskManager:
    """Return a task index that has all names."""
    from lm_eval.tasks import TaskManager

    if folder:
        custom = TaskManager(include_path=folder, include_defaults=False)
        if all(_is_complete(custom, name) for name in names):
            return custom
    manager = TaskManager(include_path=folder) if folder else _default_manager()
    for name in names:
        if name not in manager.task_index:
            hint = yaml_io.did_you_mean(name, [*SUITES, *manager.all_tasks])
            raise InputError(
                f"task {name!r} is neither a file nor a task, group or tag of lm-evaluation-harness "
                f"{metadata.version('lm_eval')}{f' or of {folder}' if folder else ''}{hint}"
            )
    return manager


@cache
def _default_manager() -> TaskManager:
    """Index the tasks of the harness: 14,000 files, which takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _is_complete(manager: TaskManager, name: str) -> bool:
    """Return True if an index has a name and its group members."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    return all(isinstance(member, str) and _is_complete(manager, member) for member in _group_members(entry))


def _group_members(entry: Any) -> list[Any]:
    """Return the names of a group's tasks; empty for a task."""
    members = entry.cfg.get("task") if entry.kind.name == "GROUP" and entry.cfg else None
    if not isinstance(members, list):
        return []
    return [member if isinstance(member, str) else member.get("group", member.get("task")) for member in members]


def _load(manager: TaskManager, names: Sequence[str]) -> TaskDict:
    """Load the tasks and groups of all names."""
    merged: TaskDict = {"tasks": {}, "groups": {}, "group_map": {}}
    origin: dict[str, str] = {}
    for name in names:
        part = _load_name(manager, name)
        for task in part["tasks"]:
            if origin.setdefault(task, name) != name:
                raise InputError(f"task {task} is requested twice, by {origin[task]} and by {name}; remove one of them")
        for section in merged:
            merged[section].update(part.get(section, {}))
    return merged


def _load_name(manager: TaskManager, name: str) -> TaskDict:
    from datasets.exceptions import DatasetsError

    try:
        return manager.load([name])
    except ModuleNotFoundError as error:
        raise InputError(f"task {name} needs the package {error.name}; install it: pip install {error.name}") from error
    except Exception as error:  # a task runs arbitrary code of the harness over external data
        task = _find_broken_task(manager, name, type(error))
        entry = manager.task_index.get(task)
        data = ((entry.cfg if entry else None) or {}).get("dataset_path")
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if data is None or not isinstance(error, OSError | DatasetsError):
            raise InputError(f"task {task} cannot be set up ({reason})") from error
        if data in _LOCAL:
            raise InputError(
                f"task {task}: its data files cannot be read ({reason}); correct data_files in its YAML file (paths "
                "are relative to where the command is run)"
            ) from error
        raise InputError(
            f"task {task}: its data set {data} cannot be fetched ({reason}); run once with a network, after which "
            "HF_DATASETS_OFFLINE=1 finds it in the cache of `datasets`, or give a local JSONL file instead of the "
            "name, or a task file over local data with --task-folder"
        ) from error


_LOCAL = ("json", "csv", "parquet", "text", "arrow")
"""Builders of `datasets` that read files named by the task."""


def _find_broken_task(manager: TaskManager, name: str, kind: type[Exception]) -> str:
    """Return the first task of a group that cannot be loaded."""
    entry = manager.task_index.get(name)
    if entry is None:
        return name
    for member in sorted(entry.tags) if entry.kind.name == "TAG" else _group_members(entry):
        if member in manager.task_index:
            try:
                manager.load([member])
            except kind:
                return _find_broken_task(manager, member, kind)
    return name


def _metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the harness's `acc,none` … to `acc`, `acc_stderr` … and `n`.

    Another filter than `none` becomes a prefix, `FILTER/METRIC`. A value that is no number becomes None.
    """
    metrics: dict[str, Any] = {"n": int(values["sample_len"])}
    for key, value in values.items():
        metric, comma, filter_name = key.partition(",")
        if comma:
            is_number = isinstance(value, int | float | np.number) and math.isfinite(value)
            label = metric if filter_name == "none" else f"{filter_name}/{metric}"
            metrics[label] = float(value) if is_number else None
    return metrics


def _set_seeds() -> None:
    """Seed few-shot examples and the order of choices as the harness does."""
    random.seed(_SEED)
    np.random.seed(_FEWSHOT_SEED)


@contextmanager
def _disable_multiprocessing() -> Iterator[None]:
    """Keep the harness's bootstrap from forking, which breaks JAX's threads."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
