"""The `score` stage: tasks and texts in, one JSON file and one table of requests out.

While it goes on, answers are kept in `FILE.parts/` (see `scoring.parts`): after an interruption, however rude, the same
command scores only what is missing and writes the same bytes. Another model, task, batch or mesh scores everything
anew. Of several processes each works on a mesh of its own devices where the mesh fits on them, and on its share of the
requests; all of them need to see the folder of FILE.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import pyarrow as pa
from jax.sharding import Mesh

from jax_selftrain import hub
from jax_selftrain.config import ScoreConfig, yaml_io
from jax_selftrain.distributed.mesh import make_mesh, parse_mesh
from jax_selftrain.errors import InputError
from jax_selftrain.evals.item_results import table_hash, to_table, write_documents
from jax_selftrain.evals.lm_eval_tasks import evaluate_tasks, load_lm_eval_tasks, split_names, write_generations
from jax_selftrain.evals.perplexity import TextFile, TokenizedText, encode_text, load_texts, perplexity_metrics
from jax_selftrain.evals.result_files import output_paths, write_results
from jax_selftrain.evals.tasks import Task, load_tasks, task_metrics
from jax_selftrain.io.manifest import sha256_file
from jax_selftrain.likelihood.engine import Likelihood, LoglikelihoodRequest, loglikelihoods
from jax_selftrain.likelihood.resumable import PartialResults, loglikelihoods_resumable, process_local_if_possible
from jax_selftrain.likelihood.tokenize import TokenizedModelInfo, encode_pairs, rolling_windows, start_token
from jax_selftrain.version import versions

REQUESTS = pa.schema(
    [
        ("task", pa.string()),
        ("doc", pa.int64()),
        ("choice", pa.int32()),
        ("loglikelihood", pa.float64()),
        ("is_greedy", pa.bool_()),
        ("tokens", pa.int32()),
    ]
)
"""One row per request, in task, document, choice order; texts come after tasks, their windows being the choices. Last
come named tasks of lm-evaluation-harness."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured."""

    tasks: dict[str, dict[str, Any]]
    texts: dict[str, dict[str, Any]]
    requests: pa.Table


@dataclass(frozen=True)
class IndexedRequest:
    """A request and where it belongs."""

    task: str
    doc: int
    choice: int
    request: LoglikelihoodRequest


@dataclass(frozen=True)
class RequestSet:
    """Tasks and texts in the tokens of one model: read once, answered as often as there are weights to ask."""

    tasks: tuple[Task, ...]
    texts: Mapping[str, Sequence[TokenizedText]]
    """The documents of each text file, by its name."""
    asked: tuple[IndexedRequest, ...]


def score(config: ScoreConfig) -> dict[str, Any]:
    """Score a model and write `FILE.json`, `FILE.requests.parquet`, `FILE.documents.parquet`, `FILE.config.yaml` and
    `FILE.timings.json`.

    Running it again gives the same bytes (but for the timings).

    Returns:
      What stands in `FILE.json`: `model`, `tasks` and `texts` by name, `fingerprints`, `versions`.

    Raises:
      InputError: nothing to score, an input that cannot be read or does not fit the model, NaN.
    """
    yaml_io.require(config)
    check_batch(
        config.batch_tokens, limit=config.limit, text_limit=config.text_limit, text_max_tokens=config.text_max_tokens
    )
    if not config.tasks and not config.texts:
        raise InputError("nothing to score: name task files with --tasks, or text files with --texts")
    output_paths(config.out)
    mesh = scoring_mesh(config.mesh)
    with process_local_if_possible(mesh):
        return _score(config, mesh)


def _score(config: ScoreConfig, mesh: Mesh) -> dict[str, Any]:
    started = time.monotonic()
    references, names = split_names(config.tasks)
    tasks, texts = load_tasks(references, config.limit), load_texts(config.texts, config.text_limit)
    files = paths_by_name(tasks, texts)
    named = (
        load_lm_eval_tasks(names, files, folder=config.task_folder, num_fewshot=config.num_fewshot) if names else None
    )
    model = hub.load_model(config.model, mesh, config.dtype, preset=config.preset)
    if model.tokenizer is None:
        raise InputError(f"{config.model}: has no tokenizer, so texts cannot be scored; add tokenizer.json")
    loaded = time.monotonic()
    fingerprints = {
        "model": hub.open_model(config.model).fingerprint,
        "tokenizer": hub.open_model(config.model).tokenizer_fingerprint,
    }
    parts = PartialResults(output_paths(config.out, "parts")[1], fingerprints)
    ask = partial(loglikelihoods_resumable, model, parts=parts, batch_tokens=config.batch_tokens)
    try:
        prepared = build_requests(model, tasks, texts, text_max_tokens=config.text_max_tokens)
        evaluation = score_requests(model, prepared, batch_tokens=config.batch_tokens, parts=parts)
        found = None if named is None else evaluate_tasks(model, named, limit=config.limit, loglikelihood_fn=ask)
    except InputError:  # the model cannot be scored: nothing of it is worth keeping
        parts.finish()
        raise
    documents = to_table(prepared.tasks, prepared.texts, evaluation.requests)
    sources = {name: sha256_file(path) for name, path in files.items()}
    if found is not None:
        documents = pa.concat_tables([documents, found.documents])
        sources |= {name: facts["requests"] for name, facts in found.provenance["tasks"].items()}
    result: dict[str, Any] = {
        "model": config.model,
        "tasks": evaluation.tasks,
        "texts": evaluation.texts,
        "fingerprints": {
            **fingerprints,
            "documents": table_hash(documents),
            "files": sources,
        },
        "versions": versions(),
    }
    requests = evaluation.requests
    if found is not None:
        result |= {"tasks": evaluation.tasks | found.tasks, "groups": found.groups, "harness": found.provenance}
        requests = pa.concat_tables([requests, pa.Table.from_pylist(found.rows, schema=REQUESTS)])
    timings = {"load_seconds": loaded - started, "score_seconds": time.monotonic() - loaded, **parts.counts()}

    def write() -> None:
        if found is not None:
            write_generations(config.out, found.generations)
        write_documents(config.out, documents)
        write_results(config.out, config, result, requests, "requests", timings)

    parts.finish(write)
    return result


def scoring_mesh(spec: str) -> Mesh:
    """The mesh that `--mesh` describes: on this process's devices where it fits on them, so that no process waits for
    another, else on those of all processes."""
    local = jax.local_devices()
    shape = parse_mesh(spec, len(local))
    return make_mesh(spec, local if shape["data"] * shape["model"] <= len(local) else None)


def evaluate(
    model: hub.LoadedModel,
    tasks: Sequence[Task] = (),
    texts: Sequence[TextFile] = (),
    *,
    text_max_tokens: int | None = None,
    batch_tokens: int | None = None,
    parts: PartialResults | None = None,
) -> Evaluation:
    """Score a model in memory on tasks and texts.

    Args:
      model: with a tokenizer.
      tasks: from `load_tasks`.
      texts: from `load_texts`.
      text_max_tokens: score only the first so many tokens of each text.
      batch_tokens: token positions in one device batch; None: see `loglikelihoods`.
      parts: where answers are kept until all are there, so that an interruption loses little.

    Raises:
      InputError: a request does not fit the model, or its log-likelihood is not a finite number.
    """
    prepared = build_requests(model, tasks, texts, text_max_tokens=text_max_tokens)
    return score_requests(model, prepared, batch_tokens=batch_tokens, parts=parts)


def build_requests(
    model: TokenizedModelInfo,
    tasks: Sequence[Task] = (),
    texts: Sequence[TextFile] = (),
    *,
    text_max_tokens: int | None = None,
) -> RequestSet:
    """Turn tasks and texts into requests to a model; `answer` puts them to it.

    Raises:
      InputError: a request does not fit the model.
    """
    start = model.special_tokens.bos_token_id
    if texts and start is None:
        raise InputError("the model names no BOS or EOS token, so there is nothing that texts could start from")
    documents = {
        text.name: [encode_text(model.tokenizer, document, text_max_tokens) for document in text.documents]
        for text in texts
    }
    asked = [item for task in tasks for item in _ask_task(model, task)]
    for name, encoded in documents.items():
        for doc, document in enumerate(encoded):
            windows = rolling_windows(document.tokens, start or 0, model.config.max_positions)
            asked += [IndexedRequest(name, doc, window, request) for window, request in enumerate(windows)]
    return RequestSet(tuple(tasks), documents, tuple(asked))


def score_requests(
    model: hub.LoadedModel,
    prepared: RequestSet,
    *,
    batch_tokens: int | None = None,
    parts: PartialResults | None = None,
) -> Evaluation:
    """Put prepared requests to a model in memory; `batch_tokens` and `parts` as in `evaluate`.

    Raises:
      InputError: a log-likelihood is not a finite number.
    """
    asked = prepared.asked
    requests = [item.request for item in asked]
    if parts is None:
        answers = loglikelihoods(model, requests, batch_tokens=batch_tokens)
    else:
        answers = loglikelihoods_resumable(model, requests, parts, batch_tokens=batch_tokens)
    grouped: dict[str, dict[int, list[Likelihood]]] = {}
    for item, likelihood in zip(asked, answers, strict=True):
        if not math.isfinite(likelihood.loglikelihood):
            raise InputError(
                f"the log-likelihood of {item.task}, document {item.doc}, choice {item.choice} is "
                f"{likelihood.loglikelihood}: the model's weights are damaged or overflow in this --dtype; check them, "
                "or try float32"
            )
        grouped.setdefault(item.task, {}).setdefault(item.doc, []).append(likelihood)
    columns = [
        [item.task for item in asked],
        [item.doc for item in asked],
        [item.choice for item in asked],
        [likelihood.loglikelihood for likelihood in answers],
        [likelihood.is_greedy for likelihood in answers],
        [likelihood.tokens for likelihood in answers],
    ]
    return Evaluation(
        tasks={task.name: task_metrics(task, list(grouped[task.name].values())) for task in prepared.tasks},
        texts={
            name: perplexity_metrics([encoded[doc] for doc in grouped[name]], list(grouped[name].values()))
            for name, encoded in prepared.texts.items()
        },
        requests=pa.Table.from_arrays(
            [pa.array(column, field.type) for column, field in zip(columns, REQUESTS, strict=True)], schema=REQUESTS
        ),
    )


def paths_by_name(tasks: Sequence[Task], texts: Sequence[TextFile]) -> dict[str, Path]:
    """The file of each task and text. Raises InputError naming two of one name, since results go by name."""
    named: list[Task | TextFile] = [*tasks, *texts]
    files = {file.name: file.path for file in named}
    if len(files) < len(named):
        repeated = Counter(file.name for file in named).most_common(1)[0][0]
        raise InputError(f"two files to score are named {repeated!r}; rename one of them")
    return files


def check_batch(batch_tokens: int | None, **limits: int | None) -> None:
    """Refuse counts below one. Raises InputError naming the flag."""
    for name, value in {"batch_tokens": batch_tokens, **limits}.items():
        if value is not None and value < 1:
            raise InputError(f"{yaml_io.flag(name)} is {value}; it must be at least 1")


def _ask_task(model: TokenizedModelInfo, task: Task) -> Iterator[IndexedRequest]:
    pairs = [(question.context, continuation) for question in task.questions for continuation in question.continuations]
    requests = iter(encode_pairs(model.tokenizer, start_token(model), pairs))
    for doc, question in enumerate(task.questions):
        for choice, continuation in enumerate(question.continuations):
            request = next(requests)
            where = f"{task.path}: choice {choice} of question {doc}"
            if not request.continuation:
                raise InputError(f"{where} ({continuation!r}) has no token of its own after its context; lengthen it")
            if len(request.continuation) > model.config.max_positions:
                raise InputError(
                    f"{where} has {len(request.continuation)} tokens, more than the {model.config.max_positions} "
                    "positions of the model; shorten it, or leave the question out"
                )
            yield IndexedRequest(task.name, doc, choice, request)
