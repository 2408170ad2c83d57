"""The `score` command: likelihood evaluation of tasks and texts.

With `--token-records`, `FILE.tokens.parquet` holds the scores of each token of the texts (`evals.token_records`).

Partial results are kept in `FILE.parts/` (`likelihood.resumable`). After an interruption the same command computes only
what is missing, and writes the same bytes. Several processes share the requests if the mesh fits the devices of one of
them; all must see the folder of FILE.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import pyarrow as pa
from jax.sharding import Mesh

from jax_selftrain import hub
from jax_selftrain.config import ScoreConfig, yaml_io
from jax_selftrain.distributed.mesh import make_mesh, parse_mesh
from jax_selftrain.errors import InputError
from jax_selftrain.evals.item_results import REQUESTS, select_items, tabulate_items
from jax_selftrain.evals.lm_eval_tasks import evaluate_tasks, load_lm_eval_tasks, refuse_unsafe_code
from jax_selftrain.evals.result_files import output_paths, write_results
from jax_selftrain.evals.task_names import split_names
from jax_selftrain.evals.tasks import Task, load_tasks, load_texts, paths_by_name, task_metrics
from jax_selftrain.evals.token_records import tabulate_texts
from jax_selftrain.io.json_files import hash_json
from jax_selftrain.io.tables import hash_table
from jax_selftrain.likelihood.engine import LoglikelihoodFn, LoglikelihoodRequest, check_finite
from jax_selftrain.likelihood.resumable import PartialResults, loglikelihoods, process_local_if_possible
from jax_selftrain.likelihood.tokenize import check_tokenizer, encode_pairs, encode_text, rolling_windows, start_token
from jax_selftrain.version import versions


@dataclass(frozen=True)
class RequestSet:
    """Tokenized requests of tasks and texts."""

    tasks: tuple[Task, ...]
    texts: Mapping[str, Sequence[str]]
    """Scored part of each document, by text file."""
    index: tuple[tuple[str, int, int], ...]
    """(task, doc, choice) of each request."""
    requests: tuple[LoglikelihoodRequest, ...]


def score(config: ScoreConfig) -> dict[str, Any]:
    """Score a model, and write the result.

    Writes `FILE.json`, `FILE.requests.parquet`, `FILE.items.parquet`, `FILE.config.yaml`, `FILE.timings.json`, and
    `FILE.tokens.parquet` on request. A second run writes the same bytes, except the timings.

    Returns:
      The content of `FILE.json`: `model`, `tasks` and `texts` by name, `fingerprints`, `versions`.

    Raises:
      InputError: nothing to score, an input that cannot be read or does not fit the model, NaN.
    """
    yaml_io.require(config)
    if not config.tasks and not config.texts:
        raise InputError("nothing to score: name task files with --tasks, or text files with --texts")
    if config.token_records and not config.texts:
        raise InputError("--token-records records the tokens of --texts; name text files, or drop it")
    output_paths(config.out)
    mesh = scoring_mesh(config.mesh)
    with process_local_if_possible(mesh):
        return _score(config, mesh)


def _score(config: ScoreConfig, mesh: Mesh) -> dict[str, Any]:
    started = time.monotonic()
    references, names = split_names(config.tasks, config)
    tasks = [*load_tasks(references, config.limit), *load_texts(config.texts, config.text_limit)]
    files = paths_by_name(tasks)
    named_tasks = None
    if names:
        named_tasks = load_lm_eval_tasks(names, files, folder=config.task_folder, num_fewshot=config.num_fewshot)
        if not config.confirm_run_unsafe_code:
            refuse_unsafe_code(named_tasks)
    hashes = {task.name: task.fingerprint for task in tasks}
    model = hub.load_model(config.model, mesh, config.dtype, preset=config.preset)
    check_tokenizer(model)
    loaded = time.monotonic()
    parts = PartialResults(output_paths(config.out, "parts")[1])
    loglikelihood_fn = partial(loglikelihoods, model, parts=parts, batch_tokens=config.batch_tokens)
    with parts.discard_on_error():
        request_set = build_requests(model, tasks, text_max_tokens=config.text_max_tokens)
        likelihoods = loglikelihood_fn(request_set.requests, token_scores=config.token_records)
        entries, tables = score_requests(request_set, lambda _: likelihoods)
        if config.token_records:
            scored = request_set.texts, request_set.index, request_set.requests, likelihoods
            tables["tokens"] = tabulate_texts(model.source, model.tokenizer, *scored)
        if named_tasks is not None:
            named, named_tables = evaluate_tasks(
                *(model, named_tasks),
                limit=config.limit,
                loglikelihood_fn=loglikelihood_fn,
                confirm_run_unsafe_code=config.confirm_run_unsafe_code,
            )
            entries |= named | {"tasks": entries["tasks"] | named["tasks"]}
            hashes |= {name: task["requests"] for name, task in named["harness"]["tasks"].items()}
            for name, table in named_tables.items():
                tables[name] = pa.concat_tables([tables[name], table]) if name in tables else table
    source = model.source
    fingerprints = {"model": source.fingerprint, "tokenizer": source.tokenizer_fingerprint, "files": hashes}
    fingerprints["items"] = hash_json(tables["items"].to_pydict())
    if config.token_records:
        fingerprints["tokens"] = hash_table(tables["tokens"])
    result = {
        "model": config.model,
        "commit": source.commit,
        **entries,
        "fingerprints": fingerprints,
        "versions": versions(),
    }
    timings = {"load_seconds": loaded - started, "score_seconds": time.monotonic() - loaded, **parts.counts()}
    parts.finish(lambda: write_results(config.out, config, result, tables, timings))
    return result


def scoring_mesh(spec: str) -> Mesh:
    """Make the mesh of `--mesh`, from local devices if they suffice."""
    local = jax.local_devices()
    shape = parse_mesh(spec, len(local))
    return make_mesh(spec, local if shape["data"] * shape["model"] <= len(local) else None)


def build_requests(
    model: hub.LoadedModel | hub.ModelRef, tasks: Sequence[Task], *, text_max_tokens: int | None = None
) -> RequestSet:
    """Tokenize tasks for `score_requests`.

    Args:
      model: a model, or its reference.
      tasks: from `load_tasks` and `load_texts`.
      text_max_tokens: maximum number of tokens of each text.

    Raises:
      InputError: a request does not fit the model.
    """
    texts: dict[str, list[str]] = {}
    pairs: list[tuple[tuple[str, int, int], LoglikelihoodRequest]] = []
    for task in tasks:
        if task.kind != "text":
            pairs += _task_requests(model, task)
            continue
        start = model.special_tokens.bos_token_id
        if start is None:
            raise InputError("the model names no BOS or EOS token, so texts have no start token")
        texts[task.name] = []
        for doc, document in enumerate(task.documents):
            tokens, text = encode_text(model.tokenizer, document, text_max_tokens)
            texts[task.name].append(text)
            windows = rolling_windows(tokens, start, model.config.max_positions)
            pairs += [((task.name, doc, window), request) for window, request in enumerate(windows)]
    index, requests = zip(*pairs, strict=True) if pairs else ((), ())
    return RequestSet(tuple(tasks), texts, index, requests)


def score_requests(
    request_set: RequestSet, loglikelihood_fn: LoglikelihoodFn
) -> tuple[dict[str, Any], dict[str, pa.Table]]:
    """Score a request set.

    Args:
      request_set: from `build_requests`.
      loglikelihood_fn: scores the requests with a model that has their tokenizer.

    Returns:
      Entries of `FILE.json`: `tasks` and `texts`, the metrics by name. Tables: `requests` and `items`
      (`item_results.REQUESTS`, `ITEMS`).

    Raises:
      InputError: a log-likelihood is not a finite number.
    """
    likelihoods = loglikelihood_fn(request_set.requests)
    labels = (f"{task}, document {doc}, choice {i}" for task, doc, i in request_set.index)
    check_finite((likelihood.loglikelihood for likelihood in likelihoods), labels)
    rows = ((*index, *likelihood[:3]) for index, likelihood in zip(request_set.index, likelihoods, strict=True))
    requests = pa.Table.from_pylist([dict(zip(REQUESTS.names, row, strict=True)) for row in rows], schema=REQUESTS)
    items = tabulate_items(request_set.tasks, request_set.texts, requests)
    entries: dict[str, Any] = {"tasks": {}, "texts": {}}
    for task in request_set.tasks:
        results, texts = select_items(items, task.name), request_set.texts.get(task.name, ())
        entries["texts" if task.kind == "text" else "tasks"][task.name] = task_metrics(results, texts)
    return entries, {"requests": requests, "items": items}


def _task_requests(
    model: hub.LoadedModel | hub.ModelRef, task: Task
) -> Iterator[tuple[tuple[str, int, int], LoglikelihoodRequest]]:
    """Yield the index and the request of each choice."""
    pairs = [
        (question.contexts[choice] if question.contexts else question.context, continuation)
        for question in task.questions
        for choice, continuation in enumerate(question.continuations)
    ]
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
                    "positions of the model; shorten it, or remove the question"
                )
            yield (task.name, doc, choice), request
