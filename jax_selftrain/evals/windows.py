"""Verbatim extraction in windows over whole documents.

A window is a suffix of `window` tokens every `stride` tokens, with the tokens before it as prefix, in the way of Cooper
et al. 2025 (arXiv:2505.12546; 50 and 50 tokens, p_z by position).

Window i of a document begins at token b = prefix + i · stride. Its prefix begins at ⌊(b − prefix) / C⌋ · C with C =
max_prefix − prefix + 1, so it has between `prefix` and `max_prefix` tokens. Windows whose prefixes begin at the same
token are a block. All of them are parts of one path, so each token of a block is scored once, and p_z of a window is a
sum over its tokens. With `max_prefix` equal to `prefix`, each window is scored alone.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from jax.sharding import Mesh
from numpy.lib.stride_tricks import sliding_window_view

from jax_selftrain import hub
from jax_selftrain.config import ExtractWindowsConfig, yaml_io
from jax_selftrain.errors import InputError
from jax_selftrain.evals.extraction import find_start_tokens, summarize
from jax_selftrain.evals.result_files import describe_mean, output_paths, write_results
from jax_selftrain.evals.score import scoring_mesh
from jax_selftrain.evals.tasks import load_texts, paths_by_name
from jax_selftrain.io import atomic
from jax_selftrain.likelihood import LoglikelihoodRequest, loglikelihoods
from jax_selftrain.likelihood.engine import check_finite
from jax_selftrain.likelihood.resumable import PartialResults, process_local_if_possible
from jax_selftrain.likelihood.tokenize import encode_text
from jax_selftrain.version import versions

COVERAGE_LEVELS = (0.001, 0.01, 0.1, 0.5, 0.9)
"""Values of p_z from which a window covers its tokens."""
METRICS = ("exact_match", "matched_tokens", "teacher_forced_accuracy", "logprob")
NUM_LISTED = 10
"""Number of most probable windows that are listed for each text."""
Plot = Callable[[Mapping[str, Any], pa.Table], str]
"""Function that draws the result and its windows as SVG."""


@dataclass(frozen=True)
class SlidingWindows:
    """Positions of windows and prefixes in a document, in tokens."""

    window: int
    stride: int
    prefix: int
    """Minimum length of a prefix."""
    max_prefix: int

    def begins(self, num_tokens: int) -> np.ndarray:
        """Return the first token [n] of each window of a document."""
        return np.arange(self.prefix, num_tokens - self.window + 1, self.stride)

    def prefix_begins(self, begins: np.ndarray) -> np.ndarray:
        """Return the first token [n] of the prefix of each window."""
        block = self.max_prefix - self.prefix + 1
        return (begins - self.prefix) // block * block


@dataclass(frozen=True, eq=False)
class TokenizedText:
    """Documents of one text file."""

    name: str
    documents: tuple[np.ndarray, ...]
    """Tokens, int32, of each document."""


def measure_windows(config: ExtractWindowsConfig, plot: Plot) -> dict[str, Any]:
    """Measure extraction of windows over documents, and write the result.

    Writes `FILE.json`, `FILE.windows.parquet`, `FILE.windows.svg`, `FILE.config.yaml`, `FILE.timings.json`.

    Args:
      config: options of the command.
      plot: draws `FILE.windows.svg`.

    Returns:
      The content of `FILE.json`: `model`, `commit`, `window`, `stride`, `prefix`, `max_prefix`, `start_token`;
      `summarize_windows` of all windows, and under `texts` of each text file; `fingerprints`, `versions`.

    Raises:
      InputError: an input that cannot be read, lengths that do not fit the model, or no windows; NaN.
    """
    yaml_io.require(config)
    output_paths(config.out)
    mesh = scoring_mesh(config.mesh)
    with process_local_if_possible(mesh):
        return _measure(config, mesh, plot)


def _measure(config: ExtractWindowsConfig, mesh: Mesh, plot: Plot) -> dict[str, Any]:
    started = time.monotonic()
    layout, start = make_layout(config), find_start_tokens(config)
    tasks = load_texts(config.texts, config.limit)
    paths_by_name(tasks)  # names are unique
    tokenizer = hub.open_model(config.model).tokenizer
    texts = [
        TokenizedText(task.name, tuple(np.array(encode_text(tokenizer, one)[0], np.int32) for one in task.documents))
        for task in tasks
    ]
    if all(len(tokens) < layout.prefix + layout.window for text in texts for tokens in text.documents):
        raise InputError(
            f"{', '.join(config.texts)}: no document has the {layout.prefix + layout.window} tokens of --prefix "
            f"{layout.prefix} and --window {layout.window}; shorten one of them"
        )
    models = {name: hub.open_model(ref) for name in ("model", "base") if (ref := getattr(config, name))}
    fingerprints = {
        **{name: model.fingerprint for name, model in models.items()},
        "tokenizer": models["model"].tokenizer_fingerprint,
        "files": {task.name: task.fingerprint for task in tasks},
    }
    prepared = time.monotonic()
    parts = PartialResults(output_paths(config.out, "parts")[1])

    def measure(ref: str) -> dict[str, np.ndarray]:
        """Measure all windows with one model, and free its memory."""
        model = hub.load_model(ref, mesh, config.dtype, preset=config.preset)
        return window_metrics(model, texts, layout, start, batch_tokens=config.batch_tokens, parts=parts)

    with parts.discard_on_error():
        columns = window_index(texts, layout) | measure(config.model)
        if config.base:
            columns |= {f"base {name}": values for name, values in measure(config.base).items()}
    summarize_text = partial(summarize_windows, columns, texts, layout, tokenizer)
    result: dict[str, Any] = {
        "model": config.model,
        "commit": models["model"].commit,
        **vars(layout),
        "start_token": config.start_token,
        **summarize_text(),
        "texts": {text.name: summarize_text(i) for i, text in enumerate(texts)},
        "fingerprints": fingerprints,
        "versions": versions(),
    }
    if config.base:
        result["base"] = {"model": config.base, **result["base"]}
    names = pa.array([text.name for text in texts])
    table = pa.table(columns | {"text": pa.DictionaryArray.from_arrays(columns["text"].astype(np.int32), names)})
    timings = {
        "prepare_seconds": prepared - started,
        "score_seconds": time.monotonic() - prepared,
        **parts.counts(),
    }

    def write() -> None:
        atomic.write_text(output_paths(config.out, "windows.svg")[1], plot(result, table))
        write_results(config.out, config, result, {"windows": table}, timings)

    parts.finish(write)
    return result


def make_layout(config: ExtractWindowsConfig) -> SlidingWindows:
    """Return the positions of windows, and check the models.

    Raises:
      InputError: lengths that contradict each other or do not fit a model; another tokenizer, or none.
    """
    models = {name: hub.open_model(ref) for name in ("model", "base") if (ref := getattr(config, name))}
    if not models["model"].has_tokenizer:
        raise InputError(f"{config.model}: has no tokenizer, so it cannot read texts; add tokenizer.json")
    if any(one.tokenizer_fingerprint != models["model"].tokenizer_fingerprint for one in models.values()):
        raise InputError(
            f"--base {config.base}: has another tokenizer than {config.model}, so the same tokens are another text; "
            "choose a model with the same tokenizer"
        )
    shortest = min(models.values(), key=lambda model: model.config.max_positions)
    room = shortest.config.max_positions - len(find_start_tokens(config)) - config.window
    after = " after the start token" if config.start_token == "bos" else ""
    for name, length in (("--prefix", config.prefix), ("--max-prefix", config.max_prefix or config.prefix)):
        if length > room:
            raise InputError(
                f"{name} {length} and --window {config.window} are longer than the {shortest.config.max_positions} "
                f"positions of {shortest.ref}{after}; shorten one of them"
            )
    if config.max_prefix is not None and config.max_prefix < config.prefix:
        raise InputError(
            f"--max-prefix {config.max_prefix} is shorter than --prefix {config.prefix}; choose at least as many tokens"
        )
    max_prefix = room if config.max_prefix is None else config.max_prefix
    return SlidingWindows(config.window, config.stride, config.prefix, max_prefix)


def window_index(texts: Sequence[TokenizedText], layout: SlidingWindows) -> dict[str, np.ndarray]:
    """Return text, document, begin and length of the prefix of each window.

    `text` and `document` are numbers from 0. Windows are in the order of the texts.
    """
    parts = [
        (i, document, layout.begins(len(tokens)))
        for i, text in enumerate(texts)
        for document, tokens in enumerate(text.documents)
    ]
    counts = [len(begins) for _, _, begins in parts]
    begins = np.concatenate([begins for _, _, begins in parts])
    return {
        "text": np.repeat([i for i, _, _ in parts], counts),
        "document": np.repeat([document for _, document, _ in parts], counts),
        "begin": begins,
        "prefix": begins - layout.prefix_begins(begins),
    }


def window_metrics(
    model: hub.LoadedModel,
    texts: Sequence[TokenizedText],
    layout: SlidingWindows,
    start: Sequence[int] = (),
    *,
    batch_tokens: int | None = None,
    parts: PartialResults | None = None,
) -> dict[str, np.ndarray]:
    """Measure extraction of each window by a model in memory.

    Args:
      model: from `hub.load_model`.
      texts: documents in the model's tokens.
      layout: positions of windows, which fit the model.
      start: tokens before each prefix.
      batch_tokens, parts: of `loglikelihoods`.

    Returns:
      Arrays [N], in the order of `window_index`: `exact_match`, `matched_tokens`, `teacher_forced_accuracy`, `logprob`,
      as from `extraction_metrics`.

    Raises:
      InputError: a log-probability is not a finite number, or a file of `parts` is damaged.
    """
    requests, offsets, labels = [], [], []
    for text in texts:
        for document, tokens in enumerate(text.documents):
            begins = layout.begins(len(tokens))
            prefixes = layout.prefix_begins(begins)
            edges = np.flatnonzero(np.diff(prefixes, prepend=-1)) if len(begins) else np.zeros(0, np.int64)
            for first, end in pairwise([*edges.tolist(), len(begins)]):
                block, begin = begins[first:end], int(begins[first])
                context = [*start, *tokens[prefixes[first] : begin].tolist()]
                continuation = tokens[begin : int(block[-1]) + layout.window].tolist()
                requests.append(LoglikelihoodRequest(context, continuation))
                offsets.append(block - begin)
            labels += [f"text {text.name}, document {document}, token {begin}" for begin in begins]
    likelihoods = loglikelihoods(model, requests, batch_tokens=batch_tokens, parts=parts, token_scores=True)
    measured = []
    for (_, continuation), likelihood, at in zip(requests, likelihoods, offsets, strict=True):
        scores = likelihood.token_scores
        assert scores is not None  # requested
        hits = scores.greedy == np.array(continuation)
        measured.append(_sum_windows(hits, scores.logprob, at, layout.window))
    columns = {name: np.concatenate([one[name] for one in measured]) for name in measured[0]}
    check_finite(columns["logprob"], labels)
    return columns


def _sum_windows(is_greedy: np.ndarray, logprob: np.ndarray, offsets: np.ndarray, window: int) -> dict[str, np.ndarray]:
    """Return the metrics of the windows of a block."""
    hits = sliding_window_view(is_greedy, window)[offsets]
    exact = hits.all(axis=1)
    return {
        "exact_match": exact,
        "matched_tokens": np.where(exact, window, np.argmin(hits, axis=1)).astype(np.int32),
        "teacher_forced_accuracy": hits.mean(axis=1),
        "logprob": sliding_window_view(logprob, window)[offsets].sum(axis=1, dtype=np.float64),
    }


def summarize_windows(
    columns: Mapping[str, np.ndarray],
    texts: Sequence[TokenizedText],
    layout: SlidingWindows,
    tokenizer: Any,
    number: int | None = None,
) -> dict[str, Any]:
    """Summarize the windows of all texts or of one.

    Args:
      columns: of `window_index` and `window_metrics`, and with a base model `base NAME` of each metric.
      texts: all texts.
      layout: positions of the windows.
      tokenizer: of the model.
      number: of the text; None: all.

    Returns:
      `documents` with windows, `num_skipped` (documents shorter than prefix and window), `tokens` of the documents with
      windows; `extraction.summarize`; `coverage` by level, the share of those tokens in windows whose p_z is at least
      the level; `most_probable`, windows that do not overlap. With a base: `base` (`summarize` and `coverage`) and
      `change`, model − base, of `logprob`, `pz` and `exact_match`. Standard errors are those of independent windows.
    """
    members = slice(None) if number is None else columns["text"] == number
    columns = {name: values[members] for name, values in columns.items()}
    documents = [tokens for text in (texts if number is None else [texts[number]]) for tokens in text.documents]
    lengths = [len(tokens) for tokens in documents if len(layout.begins(len(tokens)))]
    own = {name: columns[name] for name in METRICS}
    summary: dict[str, Any] = {
        "documents": len(lengths),
        "num_skipped": len(documents) - len(lengths),
        "tokens": sum(lengths),
        **summarize(own),
        "coverage": _coverage(columns, own["logprob"], layout.window, sum(lengths)),
        "most_probable": _list_most_probable(columns, texts, layout.window, tokenizer),
    }
    if "base logprob" not in columns:
        return summary
    base = {name: columns[f"base {name}"] for name in METRICS}
    coverage = _coverage(columns, base["logprob"], layout.window, sum(lengths))
    changes = {
        "logprob": own["logprob"] - base["logprob"],
        "pz": np.exp(own["logprob"]) - np.exp(base["logprob"]),
        "exact_match": own["exact_match"].astype(np.float64) - base["exact_match"],
    }
    change: dict[str, float | None] = {}
    for name, values in changes.items():
        change |= describe_mean(name, values)
    return summary | {"base": {**summarize(base), "coverage": coverage}, "change": change}


def _coverage(
    columns: Mapping[str, np.ndarray], logprob: np.ndarray, window: int, num_tokens: int
) -> dict[str, float | None]:
    """Return the share of tokens in windows from each level."""
    shares: dict[str, float | None] = {}
    for level in COVERAGE_LEVELS:
        text, document, begin = (columns[name][logprob >= np.log(level)] for name in ("text", "document", "begin"))
        is_same = (np.diff(text) == 0) & (np.diff(document) == 0)
        repeated = np.maximum(0, window - np.diff(begin))[is_same].sum()  # tokens that the previous window has
        shares[f"{level:g}"] = (len(begin) * window - int(repeated)) / num_tokens if num_tokens else None
    return shares


def _list_most_probable(
    columns: Mapping[str, np.ndarray], texts: Sequence[TokenizedText], window: int, tokenizer: Any
) -> list[dict[str, Any]]:
    """Return the most probable windows that do not overlap."""
    found: list[dict[str, Any]] = []
    begins: dict[tuple[int, int], list[int]] = {}
    for i in np.argsort(-columns["logprob"], kind="stable").tolist():
        text, document, begin = (int(columns[name][i]) for name in ("text", "document", "begin"))
        listed = begins.setdefault((text, document), [])
        if len(found) == NUM_LISTED or any(abs(begin - other) < window for other in listed):
            continue
        listed.append(begin)
        values = {name: columns[name][i].item() for name in ("prefix", "logprob", "exact_match")}
        suffix = tokenizer.decode(texts[text].documents[document][begin : begin + window].tolist())
        position = {"text": texts[text].name, "document": document, "begin": begin}
        found.append({**position, **values, "suffix": suffix})
    return found
