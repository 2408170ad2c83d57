"""Tasks from local JSONL files: multiple choice and last-word prediction, scored by likelihood alone.

Own layouts join context and continuation exactly as they stand. Published layouts are read as their authors wrote
them and asked as lm-evaluation-harness 0.4.13 asks them (its tasks `blimp_*`, `arc_easy`, `piqa`, `lambada_openai`):
one space between context and choice, also before a BLiMP sentence, whose context is empty.

| layout | columns | context | continuations |
|---|---|---|---|
| choices | context, choices, answer | context | choices |
| last word | context, continuation | context | continuation |
| `blimp:` | sentence_good, sentence_bad | (empty) | ␣sentence |
| `arc:` | query, choices, gold – or AI2's question, choices{text, label}, answerKey | query | ␣choice |
| `piqa:` | goal, sol1, sol2; label, or a file of labels `NAME-labels.lst` beside it | Question: goal⏎Answer: | ␣sol |
| `lambada:` | text | all but the last word | ␣last word |

Any row may have a `cluster`: a text that it shares with the questions it is not independent of (an entity, a template).

`acc_norm` divides by the length of the choice in *characters*, its separating space not counted, as the harness's
code does (`len(choice)`; its `acc_bytes` is another metric).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jax_selftrain.errors import InputError
from jax_selftrain.evals.result_files import is_text
from jax_selftrain.io.jsonl import read_jsonl
from jax_selftrain.likelihood.engine import Likelihood
from jax_selftrain.stats.standard_errors import exp_and_stderr, mean_and_stderr

JsonRow = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """One document of a task."""

    context: str
    continuations: tuple[str, ...]
    """The choices; a single one for last-word prediction."""
    answer: int
    """Index of the right choice."""
    lengths: tuple[int, ...]
    """Characters of each choice, by which `acc_norm` divides."""
    cluster: str | None = None
    """What other questions share with this one (an entity, a template), which are then not independent of it."""


@dataclass(frozen=True)
class Task:
    """A file of questions of one kind."""

    name: str
    path: Path
    kind: Literal["choice", "last_word"]
    questions: tuple[Question, ...]


def load_tasks(references: Sequence[str], limit: int | None = None) -> list[Task]:
    """Read `FILE`, `LAYOUT:FILE`, or `FOLDER` (every .jsonl in it, by name); a task is named after its file.

    Args:
      references: where the tasks are.
      limit: use only the first so many questions of each.

    Raises:
      InputError: something is not there, cannot be read, or two tasks have one name.
    """
    tasks = [_load_task(path, layout, limit) for reference in references for path, layout in _resolve(reference)]
    repeated = [name for name, times in Counter(task.name for task in tasks).items() if times > 1]
    if repeated:
        paths = " and ".join(str(task.path) for task in tasks if task.name == repeated[0])
        raise InputError(f"two tasks are named {repeated[0]!r} ({paths}); rename one of the files")
    return tasks


def task_metrics(task: Task, answers: Sequence[Sequence[Likelihood]]) -> dict[str, Any]:
    """Summary of a task, each number with its standard error.

    Args:
      task: its questions.
      answers: per question, the likelihood of each continuation.

    Returns:
      `n`, `acc`; for choices `acc_norm` and `chance` (accuracy of guessing); for last words `perplexity`
      (exp of the mean negative log-likelihood of a word). Standard errors are under `…_stderr`.
    """
    if task.kind == "last_word":
        mean, stderr = mean_and_stderr([-answer[0].loglikelihood for answer in answers])
        return {
            "n": len(answers),
            **_estimate("acc", mean_and_stderr([answer[0].is_greedy for answer in answers])),
            **_estimate("perplexity", exp_and_stderr(mean, stderr)),
        }
    right, right_normed = [], []
    for question, answer in zip(task.questions, answers, strict=True):
        scores = np.array([choice.loglikelihood for choice in answer])
        right.append(int(np.argmax(scores)) == question.answer)
        right_normed.append(int(np.argmax(scores / np.array(question.lengths))) == question.answer)
    return {
        "n": len(answers),
        **_estimate("acc", mean_and_stderr(right)),
        **_estimate("acc_norm", mean_and_stderr(right_normed)),
        "chance": float(np.mean([1 / len(question.continuations) for question in task.questions])),
    }


def _estimate(name: str, value_and_stderr: tuple[float, float | None]) -> dict[str, float | None]:
    return {name: value_and_stderr[0], f"{name}_stderr": value_and_stderr[1]}


def _resolve(reference: str) -> list[tuple[Path, str | None]]:
    """The files of a reference, and the layout that it names."""
    prefix, colon, rest = reference.partition(":")
    layout, path = (prefix, Path(rest)) if colon and prefix in _PUBLISHED else (None, Path(reference))
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise InputError(f"task {reference}: the folder holds no .jsonl file")
        return [(file, layout) for file in files]
    if path.is_file():
        return [(path, layout)]
    if layout is None and "/" not in reference and not path.suffix:
        raise InputError(
            f"task {reference!r} is not a file: names of lm-evaluation-harness tasks are understood by `score` alone, "
            "give a local JSONL file (BLiMP's, ARC's, PIQA's and LAMBADA's own columns can be read)"
        )
    raise InputError(f"task {reference}: no such file")


def _load_task(path: Path, layout: str | None, limit: int | None) -> Task:
    rows = list(read_jsonl(path, limit))
    if not rows:
        raise InputError(f"{path}: no questions in it")
    layout = layout or _detect_format(path, rows[0][1])
    labels = _piqa_labels(path, rows) if layout == "piqa" else [None] * len(rows)
    read = _READERS[layout]
    questions = []
    for (where, row), label in zip(rows, labels, strict=True):
        if label is not None:
            row = {**row, "label": label}
        try:
            question = read(row)
        except KeyError as error:
            raise InputError(f"{where}: column {error} is missing (read as {layout})") from None
        except (TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{where}: cannot be read as {layout}: {error}") from None
        _check(question, where)
        questions.append(replace(question, cluster=_cluster(row, where)))
    kind: Literal["choice", "last_word"] = "last_word" if layout in ("last_word", "lambada") else "choice"
    return Task(path.name.removesuffix(".jsonl"), path, kind, tuple(questions))


def _detect_format(path: Path, row: JsonRow) -> str:
    """The layout of a file whose columns fit exactly one."""
    fitting = [
        layout for layout, alternatives in _COLUMNS.items() if any(columns <= row.keys() for columns in alternatives)
    ]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting and "text" in row:
        raise InputError(f"{path}: a `text` column alone is no task; write lambada:{path}, or give the file to --texts")
    raise InputError(
        f"{path}: columns {', '.join(row)} fit {' and '.join(fitting) or 'no layout'}; needed are context, choices, "
        f"answer or context, continuation (or one of the prefixes {', '.join(f'{p}:' for p in sorted(_PUBLISHED))})"
    )


def _check(question: Question, where: str) -> None:
    if not all(is_text(text) for text in (question.context, *question.continuations)):
        raise InputError(f"{where}: context, choices and continuation must be texts")
    if any(length == 0 for length in question.lengths):
        raise InputError(f"{where}: an empty choice or continuation has no likelihood")
    if isinstance(question.answer, bool) or not isinstance(question.answer, int):
        raise InputError(f"{where}: the answer must be the index of a choice, not {question.answer!r}")
    if not 0 <= question.answer < len(question.continuations):
        raise InputError(
            f"{where}: answer {question.answer} is outside the {len(question.continuations)} choices (counted from 0)"
        )


def _cluster(row: JsonRow, where: str) -> str | None:
    """The optional column `cluster` of any layout."""
    label = row.get("cluster")
    if label is not None and not (is_text(label) and label):
        raise InputError(f"{where}: the cluster must be a text or null, not {label!r}")
    return label


def _join_context(context: str, choices: Sequence[str], answer: int, delimiter: str) -> Question:
    if isinstance(choices, str) or len(choices) < 2:
        raise ValueError("choices must be a list of at least two strings")
    return Question(context, tuple(delimiter + choice for choice in choices), answer, tuple(map(len, choices)))


def _read_choices(row: JsonRow) -> Question:
    return _join_context(row["context"], row["choices"], row["answer"], "")


def _read_last_word(row: JsonRow) -> Question:
    return Question(row["context"], (row["continuation"],), 0, (len(row["continuation"]),))


def _read_blimp(row: JsonRow) -> Question:
    return _join_context("", [row["sentence_good"], row["sentence_bad"]], 0, " ")


def _read_arc(row: JsonRow) -> Question:
    if "answerKey" in row:
        choices = row["choices"]
        return _join_context(
            f"Question: {row['question']}\nAnswer:", choices["text"], choices["label"].index(row["answerKey"]), " "
        )
    return _join_context(row["query"], row["choices"], row["gold"] if "gold" in row else row["answer"], " ")


def _read_piqa(row: JsonRow) -> Question:
    return _join_context(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"], " ")


def _read_lambada(row: JsonRow) -> Question:
    context, space, word = row["text"].rpartition(" ")
    if not space or not word:
        raise ValueError("the text must hold at least two words and end with one")
    return Question(context, (f" {word}",), 0, (len(word),))


def _piqa_labels(path: Path, rows: Sequence[tuple[str, JsonRow]]) -> Sequence[int | None]:
    """PIQA publishes its answers in a file of their own: 0 or 1 per line."""
    if all("label" in row for _, row in rows):
        return [None] * len(rows)
    file = path.with_name(f"{path.stem}-labels.lst")
    try:
        lines = file.read_text().split()
    except OSError:
        raise InputError(f"{path}: has no `label` column, and its answers are not in {file} either") from None
    if len(lines) < len(rows) or not set(lines) <= {"0", "1"}:
        raise InputError(f"{file}: must hold 0 or 1 for each question of {path.name}, one a line")
    return [int(label) for label in lines[: len(rows)]]


_READERS: dict[str, Callable[[JsonRow], Question]] = {
    "choices": _read_choices,
    "last_word": _read_last_word,
    "blimp": _read_blimp,
    "arc": _read_arc,
    "piqa": _read_piqa,
    "lambada": _read_lambada,
}
_PUBLISHED = ("arc", "blimp", "lambada", "piqa")
_COLUMNS: dict[str, list[set[str]]] = {
    "choices": [{"context", "choices", "answer"}],
    "last_word": [{"context", "continuation"}],
    "blimp": [{"sentence_good", "sentence_bad"}],
    "arc": [{"query", "choices", "gold"}, {"query", "choices", "answer"}, {"question", "choices", "answerKey"}],
    "piqa": [{"goal", "sol1", "sol2"}],
}
