"""Per document, how the right answer fared: the table from which two models are compared.

`FILE.requests.parquet` says what a model answered, not what was right. One row per document (a question, or a text)
adds that, and names the document by the hash of its content: whether two models were asked the same is then a matter
of comparing strings, without the task files, and the same hash assigns a document to the development or to the test
items, today and in any other task file that holds it.

A question may carry a `cluster` (an entity, a template): questions that share one are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jax_selftrain.errors import InputError
from jax_selftrain.evals.result_files import output_paths
from jax_selftrain.io import atomic
from jax_selftrain.io.manifest import hash_json

if TYPE_CHECKING:
    from jax_selftrain.evals.perplexity import TokenizedText
    from jax_selftrain.evals.tasks import Question, Task

DOCUMENTS = pa.schema(
    [
        ("task", pa.string()),
        ("doc", pa.int64()),
        ("item", pa.string()),
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
"""One row per document, in the order of the table of requests.

| column | of a choice | of a last word | of a text |
|---|---|---|---|
| item | SHA-256 of context and choices | of context and word | of the text |
| cluster | what the task file says, else null | the same | null |
| choices | how many | 1 | 0 |
| acc | the likeliest choice is the right one | the word is the greedy continuation | null |
| acc_norm | the same, by log-likelihood per character | null | null |
| loglikelihood | of the right choice, nats | of the word | of the scored part |
| log_odds | of the right choice against all others, nats | null | null |
| tokens, bytes | of the right choice | of the word | of the scored part |
"""

DEV_SHARE = 0.3
"""Share of the items that belong to the development half of the split; the rest is for tests."""

Kind = Literal["choice", "last_word", "text"]
Split = Literal["all", "dev", "test"]


@dataclass(frozen=True)
class ItemResults:
    """The documents of one task or text file as one model answered them; n entries in every array."""

    name: str
    kind: Kind
    item_hash: np.ndarray
    """SHA-256 (hex) of each document's content."""
    cluster: np.ndarray | None
    """Label of the cluster each document belongs to; None where each stands for itself."""
    choices: np.ndarray
    loglikelihood: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    acc: np.ndarray | None = None
    acc_norm: np.ndarray | None = None
    log_odds: np.ndarray | None = None

    @property
    def count(self) -> int:
        """How many documents."""
        return int(self.item_hash.size)

    @property
    def chance_accuracy(self) -> float | None:
        """Expected accuracy of guessing; None where there is nothing to choose from."""
        return float(np.mean(1 / self.choices)) if self.kind == "choice" else None

    def select(self, split: Split) -> ItemResults:
        """The documents of one half of the split, or all of them."""
        if split == "all":
            return self
        members = np.array([dev_test_split(item) == split for item in self.item_hash], bool)
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self, **{name: values[members] for name, values in arrays.items() if isinstance(values, np.ndarray)}
        )


@dataclass(frozen=True)
class ScoreResult:
    """A result of `score` read back from its files."""

    path: Path
    result: Mapping[str, Any]
    """What stands in `FILE.json`."""
    documents: Mapping[str, ItemResults]
    """By task and text file, in the order in which they were scored."""

    def fingerprint(self, what: str) -> str:
        """SHA-256 of the `model` or the `tokenizer` that was scored."""
        return str(self.result["fingerprints"][what])


def item_hash(context: str, continuations: Sequence[str]) -> str:
    """SHA-256 (hex) of what a document says: its context and its choices in their order, not which one is right."""
    return hash_json([context, list(continuations)])


def dev_test_split(item: str) -> Literal["dev", "test"]:
    """The half of the 30/70 split that an item belongs to: its hash read as a number below or above the share."""
    return "dev" if int(item[:16], 16) < DEV_SHARE * 2**64 else "test"


def to_table(tasks: Sequence[Task], texts: Mapping[str, Sequence[TokenizedText]], requests: pa.Table) -> pa.Table:
    """The table of documents that belongs to a table of requests.

    Args:
      tasks: the questions and their right answers.
      texts: the scored part of each document, by text file.
      requests: what one model answered.
    """
    answered = {name: requests[name].to_numpy(zero_copy_only=False) for name in requests.column_names}
    rows: list[tuple[Any, ...]] = []
    for task in tasks:
        mine = _rows_of(answered, task.name)
        bounds = np.cumsum([0, *(len(question.continuations) for question in task.questions)])
        for doc, (question, (start, stop)) in enumerate(zip(task.questions, pairwise(bounds), strict=True)):
            own = {name: values[start:stop] for name, values in mine.items()}
            judge = _score_last_word if task.kind == "last_word" else _score_multiple_choice
            right = question.continuations[question.answer]
            item = item_hash(question.context, question.continuations)
            outcome = judge(question, own)
            counts = int(own["tokens"][question.answer]), len(right.encode())
            rows.append((task.name, doc, item, question.cluster, len(question.continuations), *outcome, *counts))
    for name, parts in texts.items():
        mine = _rows_of(answered, name)
        totals = np.bincount(mine["doc"], mine["loglikelihood"], len(parts))
        for doc, (part, total) in enumerate(zip(parts, totals, strict=True)):
            rows.append(
                (name, doc, part.item_hash, None, 0, None, None, float(total), None, len(part.tokens), part.bytes)
            )
    columns = zip(*rows, strict=True) if rows else [()] * len(DOCUMENTS)
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, DOCUMENTS, strict=True)], schema=DOCUMENTS
    )


def log_odds(loglikelihoods: Sequence[float] | np.ndarray, right: int) -> float:
    """Of one choice against all others, in nats."""
    scores = np.asarray(loglikelihoods, np.float64)
    return float(scores[right] - np.logaddexp.reduce(np.delete(scores, right)))


def write_documents(out: str, table: pa.Table) -> None:
    """Commit the table of documents that belongs to the result `out`."""
    with atomic.commit_file(_table_file(out)) as aside:
        pq.write_table(table, aside, compression="zstd")


def table_hash(table: pa.Table) -> str:
    """SHA-256 of what a table of documents says, however it is stored."""
    return hash_json(table.to_pydict())


def load_score_result(path: str) -> ScoreResult:
    """Read back a result of `score`: `FILE.json` and `FILE.documents.parquet`.

    Raises:
      InputError: a part is missing, is not what `score` writes, or is damaged.
    """
    result = atomic.read_json(path)
    if not _is_result(result):
        raise InputError(f"{path}: is not a result of `jax-selftrain score`; give the FILE.json that --out named there")
    file = _table_file(path)
    expected = result["fingerprints"].get("documents")
    if expected is None or not file.exists():
        raise InputError(f"{path}: {file.name} does not lie beside it; score the model again")
    try:
        table = pq.read_table(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({error}); score the model again") from None
    if not table.schema.equals(DOCUMENTS) or table_hash(table) != expected:
        raise InputError(f"{file}: does not hold what {Path(path).name} says; score the model again")
    names = table["task"].unique().to_pylist()  # in the order of scoring, which the JSON's sorted keys have lost
    return ScoreResult(Path(path), result, {name: _documents(name, table) for name in names})


def _is_result(result: Any) -> bool:
    """Whether a JSON file has the shape of what `score` writes."""
    if not isinstance(result, dict) or not isinstance(result.get("model"), str):
        return False
    if not all(isinstance(result.get(section), dict) for section in ("tasks", "texts", "versions", "fingerprints")):
        return False
    marks = result["fingerprints"]
    if not isinstance(marks.get("files"), dict) or not {"model", "tokenizer"} <= marks.keys():
        return False
    return {*result["tasks"], *result["texts"]} <= marks["files"].keys()


def _table_file(out: str) -> Path:
    return output_paths(out, "documents.parquet")[1]


def _rows_of(columns: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    members = columns["task"] == name
    return {key: values[members] for key, values in columns.items()}


def _score_last_word(question: Question, rows: Mapping[str, np.ndarray]) -> tuple[Any, ...]:
    return bool(rows["is_greedy"][0]), None, float(rows["loglikelihood"][0]), None


def _score_multiple_choice(question: Question, rows: Mapping[str, np.ndarray]) -> tuple[Any, ...]:
    scores, answer = rows["loglikelihood"], question.answer
    return (
        int(np.argmax(scores)) == answer,
        int(np.argmax(scores / np.array(question.lengths))) == answer,
        float(scores[answer]),
        log_odds(scores, answer),
    )


def _documents(name: str, table: pa.Table) -> ItemResults:
    own = table.filter(pc.equal(table["task"], name))
    columns = {key: own[key].to_numpy(zero_copy_only=False) for key in own.column_names}
    choices = columns["choices"]
    kind: Kind = "choice" if choices.min(initial=2) > 1 else "last_word" if choices.min() == 1 else "text"
    present = {key: columns[key] for key in ("acc", "acc_norm", "log_odds") if own[key].null_count == 0}
    labels = columns["cluster"]
    cluster = None
    if own["cluster"].null_count < own.num_rows:
        # A document without a label is a cluster of its own; no label begins with a NUL.
        cluster = np.array([f"\0{i}" if label is None else label for i, label in enumerate(labels)])
    return ItemResults(
        name,
        kind,
        columns["item"].astype(str),
        cluster,
        choices,
        columns["loglikelihood"],
        columns["tokens"],
        columns["bytes"],
        **{key: values.astype(bool) if key != "log_odds" else values for key, values in present.items()},
    )
