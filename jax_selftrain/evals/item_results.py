"""Per-item results of `score`: the score of each question and text.

`FILE.requests.parquet` holds the scores of requests. `FILE.items.parquet` adds which answer is right: one row per item,
a question or a text. The hash of an item's content identifies it. It shows if two models were scored on the same items,
and assigns the item to the dev or the test split, in whatever file it is stored. Questions of one `cluster` (an entity,
a template) are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jax_selftrain.errors import InputError
from jax_selftrain.evals.result_files import output_paths
from jax_selftrain.io import json_files
from jax_selftrain.io.json_files import hash_json
from jax_selftrain.io.tables import load_table

if TYPE_CHECKING:
    from jax_selftrain.evals.tasks import Task

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
"""One row per request, in task, document, choice order: task files, text files (`choice` is the window), tasks of
lm-evaluation-harness."""

ITEMS = pa.schema(
    [
        ("task", pa.string()),
        ("doc", pa.int64()),
        ("item_hash", pa.string()),
        ("cluster", pa.string()),
        ("choices", pa.int32()),
        ("acc", pa.bool_()),
        ("acc_norm", pa.bool_()),
        ("loglikelihood", pa.float64()),
        ("log_odds", pa.float64()),
        ("tokens", pa.int64()),
        ("bytes", pa.int64()),
    ]
)
"""One row per item, in the order of the requests.

| column | multiple choice | last word | text | generation |
|---|---|---|---|---|
| item_hash | SHA-256 of context and choices | of context and word | of the text | of the context |
| cluster | from the task file, or null | the same | null | null |
| choices | number of choices | 1 | 0 | null |
| acc | the right choice is the most likely | the word is the greedy continuation | null | the answer is right |
| acc_norm | the same by log-likelihood per character | null | null | null |
| loglikelihood | of the right choice, nats | of the word | of the scored part | null |
| log_odds | of the right choice against all others, nats | null | null | null |
| tokens, bytes | of the right choice | of the word | of the scored part | 0 |
"""

DEV_SHARE = 0.3
"""Share of the items in the dev split."""

Kind = Literal["choice", "last_word", "text", "generation"]
Split = Literal["all", "dev", "test"]


@dataclass(frozen=True)
class ItemResults:
    """Results of a model on one task or text file, arrays [n]."""

    name: str
    kind: Kind
    item_hash: np.ndarray
    """SHA-256 (hex) of the content."""
    choices: np.ndarray
    loglikelihood: np.ndarray
    """NaN if a task generates."""
    tokens: np.ndarray
    bytes: np.ndarray
    cluster: np.ndarray | None = None
    """Cluster label of each item; None if no item has one."""
    acc: np.ndarray | None = None
    acc_norm: np.ndarray | None = None
    log_odds: np.ndarray | None = None

    @property
    def count(self) -> int:
        """Number of items."""
        return int(self.item_hash.size)

    @property
    def chance_accuracy(self) -> float | None:
        """Expected accuracy of guessing; None without choices."""
        return float(np.mean(1 / self.choices)) if self.kind == "choice" else None

    def select(self, split: Split) -> ItemResults:
        """Return the items of one split, or all."""
        if split == "all":
            return self
        members = np.array([dev_test_split(item) == split for item in self.item_hash], bool)
        arrays = {name: values for name, values in vars(self).items() if isinstance(values, np.ndarray)}
        return replace(self, **{name: values[members] for name, values in arrays.items()})


@dataclass(frozen=True)
class ScoreResult:
    """Stored result of `score`."""

    path: Path
    result: Mapping[str, Any]
    """Content of `FILE.json`."""
    items: Mapping[str, ItemResults]
    """By task and text file, in the order of scoring."""

    def fingerprint(self, name: str) -> str:
        """Return the SHA-256 of `model`, `tokenizer` or `items`."""
        return str(self.result["fingerprints"][name])


def item_hash(context: str, continuations: Sequence[str]) -> str:
    """Hash the content of an item: context and choices, not the answer."""
    return hash_json([context, list(continuations)])


def dev_test_split(item: str) -> Literal["dev", "test"]:
    """Return the split of an item hash."""
    return "dev" if int(item[:16], 16) < DEV_SHARE * 2**64 else "test"


def tabulate_items(tasks: Sequence[Task], texts: Mapping[str, Sequence[str]], requests: pa.Table) -> pa.Table:
    """Compute the table `ITEMS` from a table of requests.

    Args:
      tasks: the questions and their right answers, and text files.
      texts: the scored part of each document, by text file.
      requests: scores of one model, `REQUESTS`.
    """
    columns = {name: requests[name].to_numpy(zero_copy_only=False) for name in requests.column_names}
    rows: list[dict[str, Any]] = []
    for task in tasks:
        scores = {name: values[columns["task"] == task.name] for name, values in columns.items()}
        totals, tokens = (
            np.bincount(scores["doc"], scores[name], len(task.questions)) for name in ("loglikelihood", "tokens")
        )
        start = 0
        for doc, question in enumerate(task.questions):
            answer, choices = question.answer, len(question.continuations)
            values = scores["loglikelihood"][start : start + choices]
            row = {
                "task": task.name,
                "doc": doc,
                "item_hash": item_hash(question.context, question.continuations),
                "cluster": question.cluster,
            }
            rows.append(row)
            if task.kind == "text":
                size = len(texts[task.name][doc].encode())
                row |= {"choices": 0, "loglikelihood": totals[doc], "tokens": int(tokens[doc]), "bytes": size}
                continue
            row |= {
                "choices": choices,
                "loglikelihood": values[answer],
                "tokens": scores["tokens"][start + answer],
                "bytes": len(question.continuations[answer].encode()),
            }
            if task.kind == "last_word":
                row["acc"] = scores["is_greedy"][start]
            else:
                row["acc"] = np.argmax(values) == answer
                row["acc_norm"] = np.argmax(values / np.array(question.lengths)) == answer
                row["log_odds"] = log_odds(values, answer)
            start += choices
    return pa.Table.from_pylist(rows, schema=ITEMS)


def log_odds(loglikelihoods: Sequence[float] | np.ndarray, answer: int) -> float:
    """Return the log-odds of one choice against all others, nats."""
    scores = np.asarray(loglikelihoods, np.float64)
    return float(scores[answer] - np.logaddexp.reduce(np.delete(scores, answer)))


def load_score_result(path: str) -> ScoreResult:
    """Read a result of `score`: `FILE.json` and `FILE.items.parquet`.

    Raises:
      InputError: a file is missing or damaged, or was not written by `score`.
    """
    result = json_files.read_json(path)
    if not _is_score_result(result):
        raise InputError(f"{path}: is not a result of `jax-selftrain score`; give the FILE.json that --out named there")
    file = output_paths(path, "items.parquet")[1]
    expected = result["fingerprints"].get("items")
    if expected is None or not file.exists():
        raise InputError(
            f"{path}: was written by an older version, or {file.name} is missing; score the model again with this one"
        )
    table = load_table(file, remedy="score the model again")
    if not table.schema.equals(ITEMS) or hash_json(table.to_pydict()) != expected:
        raise InputError(f"{file}: does not match {Path(path).name}; score the model again")
    names = table["task"].unique().to_pylist()  # in the order of scoring; the keys of the JSON are sorted
    return ScoreResult(Path(path), result, {name: select_items(table, name) for name in names})


def _is_score_result(result: Any) -> bool:
    if not isinstance(result, dict) or not isinstance(result.get("model"), str):
        return False
    if not all(isinstance(result.get(section), dict) for section in ("tasks", "texts", "versions", "fingerprints")):
        return False
    fingerprints = result["fingerprints"]
    if not isinstance(fingerprints.get("files"), dict) or not {"model", "tokenizer"} <= fingerprints.keys():
        return False
    return {*result["tasks"], *result["texts"]} <= fingerprints["files"].keys()


def select_items(table: pa.Table, name: str) -> ItemResults:
    """Return the items of one task or text file."""
    rows = table.filter(pc.equal(table["task"], name)).drop_columns(["task", "doc"])
    names = [key for key in rows.column_names if key != "cluster" and rows[key].null_count == 0]
    columns: dict[str, np.ndarray] = {key: rows[key].to_numpy(zero_copy_only=False) for key in names}
    kind: Kind = "generation"
    if "choices" in columns:
        fewest = columns["choices"].min(initial=2)
        kind = "choice" if fewest > 1 else "last_word" if fewest == 1 else "text"
    else:
        columns |= {"choices": np.zeros(rows.num_rows, np.int32), "loglikelihood": np.full(rows.num_rows, np.nan)}
    columns["item_hash"] = columns["item_hash"].astype(str)
    if rows["cluster"].null_count < rows.num_rows:
        # An item without a label is its own cluster; no label begins with a NUL.
        labels = enumerate(rows["cluster"].to_pylist())
        columns["cluster"] = np.array([f"\0{i}" if label is None else label for i, label in labels])
    return ItemResults(name, kind, **columns)
