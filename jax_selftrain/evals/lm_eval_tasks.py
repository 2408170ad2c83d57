"""Tasks of lm-evaluation-harness by name (`task_names`).

The harness builds the requests and computes the metrics; `lm_eval_adapter` scores the requests. The harness is imported
only for a name, so local files can be scored without it.
"""

from __future__ import annotations

import math
import os
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from importlib import metadata
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa

from jax_selftrain import hub
from jax_selftrain.errors import InputError
from jax_selftrain.evals.harness_index import make_task_manager, task_members
from jax_selftrain.evals.item_results import ITEMS, REQUESTS, log_odds
from jax_selftrain.io.json_files import hash_json
from jax_selftrain.likelihood.engine import LoglikelihoodFn
from jax_selftrain.stats.estimators import finite_exp

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

    from jax_selftrain.evals.lm_eval_adapter import AnsweredInstance

BOOTSTRAPS = 1000
"""Bootstrap resamples for the standard error of perplexity and F1; the error of a standard error is 2 %. The harness
takes 100,000 (0.2 %) in forked processes, which JAX's threads do not survive."""

_SEED, _FEWSHOT_SEED = 0, 1234
"""Seeds of the harness: of Python's `random`; of numpy and few-shot examples."""


GENERATIONS = pa.schema([("task", pa.string()), ("doc", pa.int64()), ("choice", pa.int32()), ("text", pa.string())])
"""One row per generated text; `choice` numbers the repeats of a request."""


def load_lm_eval_tasks(
    names: Mapping[str, int | None],
    reserved_names: Collection[str] = (),
    *,
    folder: str = "",
    num_fewshot: int | None = None,
) -> TaskDict:
    """Load tasks and their data with `datasets`.

    Args:
      names: tasks, groups or tags of the harness, or of `folder`, with their own number of few-shot examples, or None.
      reserved_names: names that no task may have.
      folder: YAML files of more tasks, which override tasks of the harness.
      num_fewshot: number of few-shot examples of the other tasks; None: the task's value, else 0. A task with the value
        0 keeps it.

    Raises:
      InputError: lm-eval or a package of a task is missing, a name is unknown or reserved, or data are unavailable.
    """
    manager = make_task_manager(names, folder)
    _set_seeds()
    loaded: TaskDict = {"tasks": {}, "groups": {}, "group_map": {}}
    requested: dict[str, str] = {}
    for name in names:
        part = _load_name(manager, name)
        for task in part["tasks"]:
            if requested.setdefault(task, name) != name:
                raise InputError(
                    f"task {task} is requested twice, by {requested[task]} and by {name}; remove one of them"
                )
        for section in loaded:
            loaded[section].update(part.get(section, {}))
    for name, task in loaded["tasks"].items():
        own = names[requested[name]]
        count = num_fewshot if own is None else own
        if name in reserved_names:
            raise InputError(
                f"a file to score and a task of lm-evaluation-harness are both named {name!r}; rename the file"
            )
        if getattr(task, "MULTIMODAL", False):
            raise InputError(f"task {name} has images or audio, which language models cannot read")
        default = task.get_config("num_fewshot")
        if default is None or (count is not None and default != 0):
            task.set_config(key="num_fewshot", value=count or 0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return loaded


def refuse_unsafe_code(tasks: TaskDict) -> None:
    """Refuse tasks that execute code of the model."""
    for name, task in tasks["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(
                f"task {name} executes code that the model writes; run it in a sandbox, with --confirm-run-unsafe-code"
            )


def task_documents(tasks: TaskDict) -> dict[str, list[str]]:
    """List the documents of tasks, of all splits.

    Returns:
      By task one text per document: the question with all its choices, or with its answer.
    """
    return {
        name: [_document_text(task, document) for document in _all_documents(task)]
        for name, task in tasks["tasks"].items()
    }


def hash_lm_eval_tasks(tasks: TaskDict) -> str:
    """Hash the versions, few-shot counts and documents of tasks."""
    settings = {name: [task.VERSION, task.get_config("num_fewshot")] for name, task in tasks["tasks"].items()}
    return hash_json([metadata.version("lm_eval"), settings, task_documents(tasks)])


def _all_documents(task: Any) -> Iterator[Any]:
    for split in ("training", "validation", "test"):
        if getattr(task, f"has_{split}_docs")():
            yield from getattr(task, f"{split}_docs")()


def _document_text(task: Any, document: Any) -> str:
    """Join the question of a document and its choices or answer."""
    has_choices = task.OUTPUT_TYPE == "multiple_choice"
    answer = task.doc_to_choice(document) if has_choices else task.doc_to_target(document)
    parts = [task.doc_to_text(document), *(answer if isinstance(answer, list) else [answer])]
    if getattr(task, "multiple_input", 0):  # the choices are contexts, the target ends each of them
        parts.append(task.doc_to_target(document))
    return " ".join(part for part in parts if isinstance(part, str))


def evaluate_tasks(
    model: hub.LoadedModel,
    tasks: TaskDict,
    *,
    limit: int | None,
    loglikelihood_fn: LoglikelihoodFn,
    confirm_run_unsafe_code: bool = False,
) -> tuple[dict[str, Any], dict[str, pa.Table]]:
    """Evaluate a model in memory on tasks of the harness.

    Args:
      model: with a tokenizer.
      tasks: from `load_lm_eval_tasks`. They store their requests, so load them again for another model.
      limit: maximum number of documents of each task.
      loglikelihood_fn: see `HarnessLM`.
      confirm_run_unsafe_code: run tasks that execute code of the model; otherwise the harness refuses them.

    Returns:
      Entries of `FILE.json`: `tasks`, the metrics with their standard errors and `n`; `groups`, the same by group;
      `harness`, its `version`, and by task `version`, `num_fewshot` and `requests`, a hash of all requests. Tables:
      `requests` and `items` (`item_results.REQUESTS`, `ITEMS`), and `generations` if a task generates.

    Raises:
      InputError: a request does not fit the model, its log-likelihood is not a finite number, or a metric of a task
        cannot be computed.
    """
    from lm_eval.api import metrics as harness_metrics
    from lm_eval.evaluator import evaluate

    from jax_selftrain.evals.lm_eval_adapter import HarnessLM

    lm = HarnessLM(model, loglikelihood_fn=loglikelihood_fn)
    _set_seeds()
    # The harness prints its progress to stdout. Its bootstrap would fork, which breaks JAX's threads.
    allow = {"DISABLE_MULTIPROC": "1", **({"HF_ALLOW_CODE_EVAL": "1"} if confirm_run_unsafe_code else {})}
    # Its perplexities raise OverflowError beyond float64; infinity becomes None in `_metrics`.
    safe_math = SimpleNamespace(**(vars(math) | {"exp": _exp_or_infinity}))
    with (
        patch.dict(os.environ, allow),
        patch.object(harness_metrics, "math", safe_math),
        np.errstate(invalid="ignore"),
        redirect_stdout(sys.stderr),
    ):
        try:
            results = evaluate(
                *(lm, tasks),
                limit=limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=True,
                confirm_run_unsafe_code=confirm_run_unsafe_code,
            )
        except ArithmeticError as error:  # a task may have its own function for a metric
            names = ", ".join(tasks["tasks"])
            raise InputError(f"a metric of {names} cannot be computed ({error}); remove it from the task") from error
    if results is None:
        raise AssertionError("the harness returns results on rank 0, which is the only one")
    order = {name: i for i, name in enumerate(tasks["tasks"])}
    answered = sorted(lm.answered, key=lambda a: (order[a.instance.task_name], a.instance.doc_id, a.instance.idx))
    facts = {
        name: {
            "version": results["versions"].get(name),
            "num_fewshot": results["n-shot"].get(name),
            "requests": hash_json([a.instance.args for a in answered if a.instance.task_name == name]),
        }
        for name in order
    }
    groups = results.get("groups", {}).items()
    entries = {
        "tasks": {name: _metrics(results["results"][name]) for name in order},
        "groups": {name: _metrics(values) for name, values in groups if "sample_len" in values},  # aggregated ones
        "harness": {"version": metadata.version("lm_eval"), "tasks": facts},
    }
    requests, generations = _tabulate_answers(answered)
    tables = {"requests": requests, "items": _tabulate_items(tasks["tasks"], answered, results["samples"])}
    return entries, tables | ({"generations": generations} if generations.num_rows else {})


def _tabulate_answers(answered: Sequence[AnsweredInstance]) -> tuple[pa.Table, pa.Table]:
    """Return the tables `REQUESTS` and `GENERATIONS`."""
    requests: list[dict[str, Any]] = []
    generations: list[dict[str, Any]] = []
    repeats: Counter[tuple[str, int]] = Counter()
    previous = None
    for instance, likelihoods, text in answered:
        key = {"task": instance.task_name, "doc": instance.doc_id}
        if text is not None:
            generations.append({**key, "choice": repeats[instance.task_name, instance.doc_id], "text": text})
            repeats[instance.task_name, instance.doc_id] += 1
        if instance is not previous:  # a repeated request has one likelihood
            is_rolling = instance.request_type == "loglikelihood_rolling"
            for i, likelihood in enumerate(likelihoods):
                requests.append({**key, "choice": i if is_rolling else instance.idx, **likelihood._asdict()})
        previous = instance
    return pa.Table.from_pylist(requests, schema=REQUESTS), pa.Table.from_pylist(generations, schema=GENERATIONS)


def _tabulate_items(
    tasks: Mapping[str, Any], answered: Sequence[AnsweredInstance], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> pa.Table:
    """Return the table `ITEMS`, in task and document order.

    The right answer and `acc` come from the harness; log-odds come from the requests. A task has items if every
    document has one right answer (multiple choice, or one continuation as in LAMBADA) and its `acc` is 0 or 1. `acc` of
    a generation task is its first metric, after its first filter.
    """
    answers: dict[tuple[str, int], list[AnsweredInstance]] = defaultdict(list)
    for answer in answered:
        if answer.instance.request_type in ("loglikelihood", "generate_until"):
            answers[answer.instance.task_name, answer.instance.doc_id].append(answer)
    rows = []
    for name, task in tasks.items():
        # A document has a sample for each filter; the first counts.
        documents = {sample["doc_id"]: sample for sample in reversed(samples.get(name, ()))}
        items = [_describe_item(task, documents[doc], answers[name, doc]) for doc in sorted(documents)]
        rows += [{"task": name, **item} for item in items if item] if all(items) else []
    return pa.Table.from_pylist(rows, schema=ITEMS)


def _describe_item(task: Any, sample: Mapping[str, Any], answers: Sequence[AnsweredInstance]) -> dict[str, Any] | None:
    """Return a row of `ITEMS`; None without single right answer."""
    if "acc_mutual_info" in sample:
        answers = answers[: len(answers) // 2]  # the second half are the choices without context
    gold: Any = None
    if task.OUTPUT_TYPE == "generate_until":
        acc = sample[sample["metrics"][0]]
        row = {"doc": sample["doc_id"], "item_hash": hash_json(answers[0].instance.args[0]), "acc": bool(acc)}
        return row | {"tokens": 0, "bytes": 0} if acc in (0, 1) else None
    if task.OUTPUT_TYPE == "loglikelihood":
        gold = 0 if len(answers) == 1 else None
    elif task.OUTPUT_TYPE == "multiple_choice":
        is_by_context = getattr(task, "multiple_input", 0)
        gold = task.doc_to_text(sample["doc"]) if is_by_context else task.doc_to_target(sample["doc"])
    if type(gold) is not int or not 0 <= gold < len(answers) or sample.get("acc") not in (0, 1):
        return None
    scores = [answer.likelihoods[0].loglikelihood for answer in answers]
    acc_norm = sample.get("acc_norm")
    return {
        "doc": sample["doc_id"],
        "item_hash": hash_json([list(answer.instance.args) for answer in answers]),
        "choices": len(answers),
        "acc": bool(sample["acc"]),
        "acc_norm": None if acc_norm is None else bool(acc_norm),
        "loglikelihood": scores[gold],
        "log_odds": log_odds(scores, gold) if len(scores) > 1 else None,
        "tokens": answers[gold].likelihoods[0].tokens,
        "bytes": len(answers[gold].instance.args[1].encode()),
    }


def _load_name(manager: TaskManager, name: str) -> TaskDict:
    from datasets.exceptions import DatasetsError

    try:
        # The metric of code reads the variable when it is loaded; it then executes an example of its own only.
        with patch.dict(os.environ, HF_ALLOW_CODE_EVAL="1"):
            return manager.load([name])
    except ModuleNotFoundError as error:
        raise InputError(f"task {name} needs the package {error.name}; install it: pip install {error.name}") from error
    except Exception as error:  # a task runs arbitrary code of the harness over external data
        entry = manager.task_index.get(name)
        for member in task_members(entry) if entry else ():
            if member in manager.task_index:
                _load_name(manager, member)  # names the first that cannot be loaded
        data = ((entry.cfg if entry else None) or {}).get("dataset_path")
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if data is None or not isinstance(error, OSError | DatasetsError):
            raise InputError(f"task {name} cannot be set up ({reason})") from error
        if data in _LOCAL:
            raise InputError(
                f"task {name}: its data files cannot be read ({reason}); correct data_files in its YAML file (paths "
                "are relative to where the command is run)"
            ) from error
        raise InputError(
            f"task {name}: its data set {data} cannot be fetched ({reason}); run once with a network, after which "
            "HF_DATASETS_OFFLINE=1 finds it in the cache of `datasets`, or give a local JSONL file instead of the "
            "name, or a task file over local data with --task-folder"
        ) from error


_LOCAL = ("json", "csv", "parquet", "text", "arrow")
"""Builders of `datasets` that read files named by the task."""


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


def _exp_or_infinity(value: float) -> float:
    result = finite_exp(value)
    return math.inf if result is None else result


def _set_seeds() -> None:
    """Seed few-shot examples and the order of choices as the harness does."""
    random.seed(_SEED)
    np.random.seed(_FEWSHOT_SEED)
