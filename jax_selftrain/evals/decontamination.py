"""The `decontaminate` command: a corpus without samples that overlap with benchmarks.

A sample is removed if it shares one n-gram of words with a document of a benchmark (`corpus.word_ngrams`). A document
is the question with all its choices, or with its answer, as one text. The documents of a task of lm-evaluation-harness
are those of all its splits.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain.config import DecontaminateConfig, yaml_io
from jax_selftrain.corpus import Corpus, open_corpus
from jax_selftrain.corpus.transforms import choose_size_matched, map_corpus
from jax_selftrain.corpus.word_ngrams import NgramIndex
from jax_selftrain.errors import InputError
from jax_selftrain.evals.lm_eval_tasks import load_lm_eval_tasks, task_documents
from jax_selftrain.evals.task_names import split_names
from jax_selftrain.evals.tasks import load_tasks, load_texts, paths_by_name
from jax_selftrain.io import json_files
from jax_selftrain.io.json_files import hash_json

REPORT = "decontamination.json"


def decontaminate(config: DecontaminateConfig) -> dict[str, Any]:
    """Write a corpus without the samples that overlap with benchmarks.

    Returns:
      The content of `OUT/decontamination.json`: `samples` and `removed`, their numbers; `tasks`, by name the number of
      `documents`, of `samples` that overlap with them, and the shared `ngrams`, each with the number of samples that
      have it.

    Raises:
      InputError: an input cannot be read, a folder holds another corpus, or no sample or too few would remain.
    """
    yaml_io.require(config)
    source, documents = open_corpus(config.corpus), benchmark_documents(config)
    removed, report = find_overlaps(source, NgramIndex.build(documents, config.ngram))
    if removed.all():
        raise InputError(
            f"{source.folder}: every sample shares {config.ngram} words with a benchmark; none would remain"
        )
    policy = {"benchmark ngram": config.ngram}
    facts: dict[str, Any] = {"policy": policy, "benchmarks": hash_json(documents), "dropped": int(removed.sum())}
    folders = [(config.out, "decontaminated", facts, removed)]
    if config.control:
        control = facts | {"policy": policy | {"control seed": config.seed}}
        folders.append(
            (config.control, "size-matched control", control, choose_size_matched(source, removed, config.seed))
        )
    for out, kind, facts, dropped in folders:
        map_corpus(source, out, kind, facts, lambda samples: (samples, {}), copies=~dropped)
    json_files.write_json(Path(config.out) / REPORT, report)
    return report


def benchmark_documents(config: DecontaminateConfig) -> dict[str, list[str]]:
    """Read the documents of all tasks and texts, by name."""
    files, names = split_names(config.tasks)
    tasks = [*load_tasks(files), *load_texts(config.texts)]
    paths_by_name(tasks)  # names are unique
    documents = {
        task.name: ["".join([question.context, *question.continuations]) for question in task.questions]
        for task in tasks
    }
    if names:
        documents |= task_documents(load_lm_eval_tasks(names, documents, folder=config.task_folder))
    if not documents:
        raise InputError("decontaminate: needs --tasks or --texts, the benchmarks to compare with")
    return documents


def find_overlaps(corpus: Corpus, index: NgramIndex) -> tuple[np.ndarray, dict[str, Any]]:
    """Find the samples that share an n-gram with a document.

    Returns:
      bool [N], True for samples that overlap; and the content of `decontamination.json`.
    """
    removed = np.zeros(len(corpus), bool)
    samples_by_ngram = np.zeros(len(index.hashes), np.int64)
    samples_by_group = np.zeros(len(index.groups), np.int64)
    first = 0
    for batch in corpus.batches(["text"]):
        sample, ngram = index.find(batch.column("text"))
        removed[first + sample] = True
        np.add.at(samples_by_ngram, ngram, 1)
        pair, group = index.list_groups(ngram)
        distinct = np.unique(np.stack([sample[pair], group], axis=1), axis=0)
        np.add.at(samples_by_group, distinct[:, 1], 1)
        first += batch.num_rows
    shared = np.flatnonzero(samples_by_ngram)
    order = shared[np.argsort(-samples_by_ngram[shared], kind="stable")]
    pair, group = index.list_groups(order)
    tasks: dict[str, dict[str, Any]] = {
        name: {"documents": documents, "samples": int(samples), "ngrams": []}
        for name, documents, samples in zip(index.groups, index.num_documents, samples_by_group, strict=True)
    }
    for ngram, member in zip(order[pair].tolist(), group.tolist(), strict=True):
        entry = {"ngram": index.format_ngram(ngram), "samples": int(samples_by_ngram[ngram])}
        tasks[index.groups[member]]["ngrams"].append(entry)
    return removed, {
        "corpus": str(corpus.folder),
        "ngram": index.n,
        "samples": len(corpus),
        "removed": int(removed.sum()),
        "tasks": tasks,
    }


def describe_report(report: Mapping[str, Any]) -> str:
    """Return one line per task."""
    lines = [
        f"{name}: {task['samples']:,} samples share {len(task['ngrams']):,} {report['ngram']}-grams with "
        f"{task['documents']:,} documents"
        for name, task in report["tasks"].items()
    ]
    return "\n".join([*lines, f"{report['removed']:,} of {report['samples']:,} samples removed"])
