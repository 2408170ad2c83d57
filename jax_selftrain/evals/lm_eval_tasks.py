"""Tasks of lm-evaluation-harness by name: which words are names, what they ask, and what came of it.

A word behind `--tasks` that is neither a file nor a folder names a task, group or tag of the harness, or one of our
suites. The harness builds the requests and works out the metrics; `scoring.harness` answers. Nothing here imports the
harness before a name is given, so that local files are scored where it is not installed.
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
import pyarrow.parquet as pq

from jax_selftrain import hub
from jax_selftrain.config import yaml_io
from jax_selftrain.errors import InputError
from jax_selftrain.evals.lm_eval_items import items_from_answers
from jax_selftrain.evals.result_files import output_paths
from jax_selftrain.io import atomic
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
"""Ours, before the harness's names: what Pythia's authors published; what carries signal at its sizes; BLiMP's 67."""

BOOTSTRAPS = 1000
"""Resamples behind the standard error of a metric that is no mean (perplexity, F1). The harness takes 100,000, in
several forked processes, which threads of JAX do not survive; its error of a standard error is then 0.2 %, here 2 %."""

_SEED, _FEWSHOT_SEED = 0, 1234
"""What the harness seeds Python's `random`, and numpy and the choice of few-shot examples with."""


@dataclass(frozen=True)
class LmEvalTasks:
    """Tasks of the harness with their data, ready to be asked."""

    loaded: TaskDict
    version: str
    """Of lm-eval."""


@dataclass(frozen=True)
class HarnessEvaluation:
    """What the harness measured."""

    tasks: dict[str, dict[str, Any]]
    """Per task: metrics with their standard errors, and `n`."""
    groups: dict[str, dict[str, Any]]
    """The same of groups whose tasks are put together."""
    provenance: dict[str, Any]
    """`version` of the harness; per task its `version`, `num_fewshot` and a fingerprint of what was asked."""
    rows: list[dict[str, Any]]
    """Of `score.REQUESTS`, in task, document, choice order."""
    documents: pa.Table
    """How the right answer of each document fared (`documents.DOCUMENTS`)."""
    generations: pa.Table
    """Texts that were generated; no rows where no task asks for any."""


GENERATIONS = pa.schema([("task", pa.string()), ("doc", pa.int64()), ("choice", pa.int32()), ("text", pa.string())])
"""One row per generated text; repeats of one request are counted by `choice`."""


def split_names(references: Sequence[str]) -> tuple[list[str], list[str]]:
    """(files and folders, names) of what stands behind `--tasks`, each in order; suites are replaced by their tasks."""
    files = [reference for reference in references if not _is_name(reference)]
    names = [name for reference in references if _is_name(reference) for name in SUITES.get(reference, (reference,))]
    return files, list(dict.fromkeys(names))


def load_lm_eval_tasks(
    names: Sequence[str], reserved_names: Collection[str] = (), *, folder: str = "", num_fewshot: int | None = None
) -> LmEvalTasks:
    """Find tasks by name and fetch their data, through `datasets` and its cache.

    Args:
      names: tasks, groups or tags of the harness, or of `folder`.
      taken: names that no task may have, since results go by name.
      folder: YAML files of further tasks, which come before the harness's own of the same name.
      num_fewshot: solved examples before each question; None: what the task says, else none. A task that says 0 keeps
        it.

    Raises:
      InputError: lm-eval or a package that a task needs is not installed, a name is unknown or taken, or data cannot be
        had.
    """
    import_module("jax_selftrain.evals.lm_eval_adapter")  # one sentence where lm-eval is not installed
    if folder and not Path(folder).is_dir():
        raise InputError(f"--task-folder {folder}: no such folder; give the one that holds the task files (*.yaml)")
    manager = _manager_for(names, folder)
    _seed()
    loaded = _load(manager, names)
    for name, task in loaded["tasks"].items():
        if name in reserved_names:
            raise InputError(
                f"a file to score and a task of lm-evaluation-harness are both named {name!r}; rename the file"
            )
        if getattr(task, "MULTIMODAL", False):
            raise InputError(f"task {name} shows images or plays sounds, of which models here know nothing")
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(f"task {name} runs code that a model has written, which is never done here")
        said = task.get_config("num_fewshot")
        if said is None or (num_fewshot is not None and said != 0):
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
    """Put the tasks to a model in memory.

    Args:
      model: with a tokenizer.
      tasks: from `open_tasks`; they remember what they were asked, so open them anew for another model.
      limit: use only the first so many documents of each.
      batch_tokens: token positions in one device batch; None: the engine's default.
      ask: answers requests in place of `likelihood.loglikelihoods`.

    Raises:
      InputError: a request does not fit the model, or its log-likelihood is not a finite number.
    """
    from lm_eval.evaluator import evaluate

    from jax_selftrain.evals.lm_eval_adapter import HarnessLM

    lm = HarnessLM(model, batch_tokens=batch_tokens, ask=loglikelihood_fn)
    lm.answered = []
    _seed()
    with (
        _disable_multiprocessing(),
        redirect_stdout(sys.stderr),
    ):  # the harness prints its progress where results belong
        found = evaluate(lm, tasks.loaded, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=True)
    if found is None:
        raise AssertionError("the harness returns results on rank 0, which is the only one")
    order = {name: place for place, name in enumerate(tasks.loaded["tasks"])}
    answered = sorted(lm.answered, key=lambda a: (order[a.instance.task_name], a.instance.doc_id, a.instance.idx))
    asked: dict[str, list[Any]] = {name: [] for name in order}
    for answer in answered:
        asked[answer.instance.task_name].append(answer.instance.args)
    measured = {name: _metrics(values) for name, values in found["results"].items()}
    return HarnessEvaluation(
        tasks={name: measured[name] for name in order},
        groups={name: _metrics(values) for name, values in found.get("groups", {}).items()},
        provenance={
            "version": tasks.version,
            "tasks": {
                name: {
                    "version": found["versions"].get(name),
                    "num_fewshot": found["n-shot"].get(name),
                    "requests": hash_json(asked[name]),
                }
                for name in order
            },
        },
        rows=list(_likelihood_rows(answered)),
        documents=items_from_answers(tasks.loaded["tasks"], answered, found["samples"]),
        generations=pa.Table.from_pylist(list(_generation_rows(answered)), schema=GENERATIONS),
    )


def write_generations(out: str, generations: pa.Table) -> None:
    """Commit `FILE.generations.parquet`, if anything was generated."""
    if generations.num_rows:
        _, file = output_paths(out, "generations.parquet")
        with atomic.commit_file(file) as aside:
            pq.write_table(generations, aside, compression="zstd")


def _likelihood_rows(answered: Sequence[AnsweredInstance]) -> Iterator[dict[str, Any]]:
    before = None
    for instance, likelihoods, _ in answered:
        windows = instance.request_type == "loglikelihood_rolling"
        if instance is not before:  # a request that is put several times has one likelihood
            for i, answer in enumerate(likelihoods):
                choice = i if windows else instance.idx
                yield {"task": instance.task_name, "doc": instance.doc_id, "choice": choice, **answer._asdict()}
        before = instance


def _generation_rows(answered: Sequence[AnsweredInstance]) -> Iterator[dict[str, Any]]:
    times: Counter[tuple[str, int]] = Counter()
    for instance, _, text in answered:
        if text is not None:
            document = instance.task_name, instance.doc_id
            yield {"task": document[0], "doc": document[1], "choice": times[document], "text": text}
            times[document] += 1


def _is_name(reference: str) -> bool:
    """Whether a word can only be a name: nothing lies there, and it does not look like a file."""
    return re.fullmatch(r"[^/:]+", reference) is not None and not (
        Path(reference).exists() or Path(reference).suffix in _FILES
    )


_FILES = (".jsonl", ".json", ".yaml", ".yml", ".lst", ".parquet")


def _manager_for(names: Sequence[str], folder: str) -> TaskManager:
    """An index of tasks that knows all the names."""
    from lm_eval.tasks import TaskManager

    if folder:
        own = TaskManager(include_path=folder, include_defaults=False)
        if all(name in own.task_index and _requires_opt_in(own, name) for name in names):
            return own
    manager = TaskManager(include_path=folder) if folder else _built_in()
    for name in names:
        if name not in manager.task_index:
            hint = yaml_io.did_you_mean(name, [*SUITES, *manager.all_tasks])
            raise InputError(
                f"task {name!r} is neither a file nor a task, group or tag of lm-evaluation-harness "
                f"{metadata.version('lm_eval')}{f' or of {folder}' if folder else ''}{hint}"
            )
    return manager


@cache
def _built_in() -> TaskManager:
    """The harness's own tasks: 14,000 files, whose reading takes a while."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _requires_opt_in(manager: TaskManager, name: str) -> bool:
    """Whether everything that a group or tag refers to is known to the same index."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    members = entry.cfg.get("task") if entry.kind.name == "GROUP" and entry.cfg else None
    if not isinstance(members, list):
        return True
    named = [member if isinstance(member, str) else member.get("group", member.get("task")) for member in members]
    return all(isinstance(member, str) and _requires_opt_in(manager, member) for member in named)


def _load(manager: TaskManager, names: Sequence[str]) -> TaskDict:
    """The tasks and groups of all names, each of which may stand for several."""
    whole: TaskDict = {"tasks": {}, "groups": {}, "group_map": {}}
    origin: dict[str, str] = {}
    for name in names:
        part = _load_name(manager, name)
        for task in part["tasks"]:
            if origin.setdefault(task, name) != name:
                raise InputError(
                    f"task {task} is asked for twice, by {origin[task]} and by {name}; leave one of them out"
                )
        for section in whole:
            whole[section].update(part.get(section, {}))
    return whole


def _load_name(manager: TaskManager, name: str) -> TaskDict:
    from datasets.exceptions import DatasetsError

    try:
        return manager.load([name])
    except ModuleNotFoundError as error:
        raise InputError(f"task {name} needs the package {error.name}; install it: pip install {error.name}") from error
    except Exception as error:  # a task runs the harness's code and its own over data from anywhere: anything happens
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
            f"task {task}: its data set {data} cannot be fetched ({reason}); run once where there is a network, after "
            "which HF_DATASETS_OFFLINE=1 finds it in the cache of `datasets`, or give a local JSONL file instead of "
            "the name, or a task file over local data with --task-folder"
        ) from error


_LOCAL = ("json", "csv", "parquet", "text", "arrow")
"""Builders of `datasets` over files that the task names."""


def _find_broken_task(manager: TaskManager, name: str, kind: type[Exception]) -> str:
    """The task of a group or tag that cannot be loaded; the name itself where it is a task."""
    entry = manager.task_index.get(name)
    members: list[Any] = []
    if entry is not None and entry.kind.name == "TAG":
        members = sorted(entry.tags)
    elif entry is not None and entry.kind.name == "GROUP" and entry.cfg:
        members = entry.cfg["task"] if isinstance(entry.cfg.get("task"), list) else []
    for member in members:
        member = member if isinstance(member, str) else member.get("group", member.get("task"))
        if member in manager.task_index:
            try:
                manager.load([member])
            except kind:
                return _find_broken_task(manager, member, kind)
    return name


def _metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    """`acc`, `acc_stderr` … and `n` from the harness's `acc,none`; another filter than `none` comes before the metric.

    None where the harness gives no number.
    """
    found: dict[str, Any] = {"n": int(values["sample_len"])}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if comma:
            number = isinstance(value, int | float | np.number) and math.isfinite(value)
            found[metric if filtered == "none" else f"{filtered}/{metric}"] = float(value) if number else None
    return found


def _seed() -> None:
    """The harness's own seeds, from which few-shot examples and, in some tasks, the order of choices follow."""
    random.seed(_SEED)
    np.random.seed(_FEWSHOT_SEED)


@contextmanager
def _disable_multiprocessing() -> Iterator[None]:
    """Keep the harness's bootstrap from forking: JAX's threads do not survive it."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
