"""Tasks from local JSONL files: multiple choice, last-word prediction, perplexity of texts.

Our formats join context and continuation without a separator. Published formats are read as published, and prompted as
in lm-evaluation-harness 0.4.13 (`blimp_*`, `arc_easy`, `piqa`, `lambada_openai`, `sciq`, `winogrande`): one space
between context and choice, also before a BLiMP sentence, whose context is empty. `FORMATS` lists the columns. Any row
may have a `cluster`, a label (entity, template) that it shares with the questions that it depends on.

A text is scored as it would be sampled: start token, then its tokens, without an end token. (lm-evaluation-harness lets
Llama-like tokenizers add a second BOS and scores its prediction.) The document is the unit of standard errors, because
tokens of one text are not independent.

`acc_norm` divides by the length of the choice in *characters*, without the separating space, as the harness's code does
(`len(choice)`; its `acc_bytes` is another metric).
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain import hub
from jax_selftrain.errors import InputError
from jax_selftrain.evals.item_results import ItemResults, Kind, Split, dev_test_split, item_hash
from jax_selftrain.evals.result_files import describe_mean, is_text, with_stderr
from jax_selftrain.io.jsonl import check_text
from jax_selftrain.io.rows import read_rows
from jax_selftrain.stats.estimators import exp_and_stderr, mean_and_stderr, ratio_and_stderr

JsonRow = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """Question of a task."""

    context: str
    continuations: tuple[str, ...]
    """The choices, the last word, or the text."""
    answer: int
    """Index of the right choice."""
    lengths: tuple[int, ...]
    """Number of characters of each choice, for `acc_norm`."""
    cluster: str | None = None
    """Label of dependent questions (an entity, a template)."""
    contexts: tuple[str, ...] = ()
    """Context of each choice, if they differ (WinoGrande)."""


@dataclass(frozen=True)
class Task:
    """Questions or texts of one file or split."""

    name: str
    path: Path
    """The file, or the reference of the split."""
    kind: Kind
    questions: tuple[Question, ...]
    files: tuple[Path, ...] = ()
    """The files, if they are several."""

    @property
    def documents(self) -> list[str]:
        """The texts, or the first choice of each question."""
        return [question.continuations[0] for question in self.questions]

    @property
    def fingerprint(self) -> str:
        """Hash of the content of the files."""
        return hub.hash_files(self.files or (self.path,))


def load_tasks(references: Sequence[str], limit: int | None = None) -> list[Task]:
    """Read tasks, which are named after their files.

    Args:
      references: `FILE`, `FORMAT:FILE`, or `FOLDER` with `.jsonl` files.
      limit: maximum number of questions of each task.

    Raises:
      InputError: a file is missing or cannot be read.
    """
    return [_load_task(path, format, limit) for reference in references for path, format in _resolve(reference)]


def load_texts(references: Sequence[str], limit: int | None = None) -> list[Task]:
    """Read the `text` field of files (`read_rows`); skip blank texts.

    Args:
      references: files, or splits of data sets of the Hugging Face hub (`hub.dataset_split`).
      limit: maximum number of rows of each.

    Raises:
      InputError: a file is missing or not JSONL, has a line without text, or has no texts; a download fails.
    """
    tasks = []
    for reference in references:
        path, questions = Path(reference), []
        files = tuple(hub.text_files(reference, limit))
        for where, row in islice(chain.from_iterable(read_rows(file, limit) for file in files), limit):
            if "text" not in row:
                raise InputError(f"{where}: no text under `text`")
            if (text := check_text(row["text"], where)).strip():
                questions.append(Question("", (text,), 0, (len(text),)))
        if not questions:
            raise InputError(f"{path}: no texts in it")
        tasks.append(Task(text_name(reference), path, "text", tuple(questions), files))
    return tasks


def text_name(reference: str) -> str:
    """Return the name of a text file or split in results."""
    split = hub.parse_dataset_split(reference)
    return _name(Path(reference)) if split is None else split.label


def select_split(task: Task, split: Split) -> Task:
    """Return the items of a task or text file in a split.

    Raises:
      InputError: there are none.
    """
    members = [
        question
        for question in task.questions
        if split in ("all", dev_test_split(item_hash(question.context, question.continuations)))
    ]
    if not members:
        raise InputError(
            f"{task.path}: none of its {len(task.questions):,} items is in the {split} split; use split all"
        )
    return replace(task, questions=tuple(members))


def paths_by_name(tasks: Sequence[Task]) -> dict[str, Path]:
    """Return the file of each task.

    Raises:
      InputError: two files have one name.
    """
    name, times = Counter(task.name for task in tasks).most_common(1)[0] if tasks else ("", 1)
    if times > 1:
        paths = " and ".join(str(task.path) for task in tasks if task.name == name)
        raise InputError(f"two files to score are named {name!r} ({paths}); rename one of them")
    return {task.name: task.path for task in tasks}


def task_metrics(results: ItemResults, texts: Sequence[str] = ()) -> dict[str, Any]:
    """Compute the metrics of a task.

    Args:
      results: of each question or text.
      texts: the scored part of each text.

    Returns:
      `n`, and by kind: multiple choice: `acc`, `acc_norm` and `chance` (accuracy of guessing). Last words: `acc` and
      `perplexity` (exp of the mean negative log-likelihood of a word). Texts: `tokens`, `bytes`, `words` (pieces
      between white space, as in lm-evaluation-harness), `nll` (nats per token), `perplexity` (per token),
      `word_perplexity`, `byte_perplexity`, `bits_per_byte`. Standard errors are under `…_stderr`.
    """
    metrics: dict[str, Any] = {"n": results.count}
    if results.kind == "text":
        words = np.array([len(re.split(r"\s+", text)) for text in texts])
        counts = {"tokens": results.tokens, "bytes": results.bytes, "words": words}
        token, byte, word = (ratio_and_stderr(-results.loglikelihood, count) for count in counts.values())
        metrics |= {unit: int(count.sum()) for unit, count in counts.items()} | with_stderr("nll", token)
        for name, (value, error) in {"": token, "word_": word, "byte_": byte}.items():
            metrics |= with_stderr(f"{name}perplexity", exp_and_stderr(value, error))
        return metrics | with_stderr("bits_per_byte", (byte[0] / np.log(2), byte[1] and byte[1] / np.log(2)))
    assert results.acc is not None
    metrics |= describe_mean("acc", results.acc)
    if results.kind == "last_word":
        return metrics | with_stderr("perplexity", exp_and_stderr(*mean_and_stderr(-results.loglikelihood)))
    assert results.acc_norm is not None
    return metrics | describe_mean("acc_norm", results.acc_norm) | {"chance": results.chance_accuracy}


def split_format(reference: str) -> tuple[str | None, str]:
    """Split `FORMAT:FILE`; a path may hold other colons."""
    prefix, colon, rest = reference.partition(":")
    return (prefix, rest) if colon and prefix in _PUBLISHED else (None, reference)


def _resolve(reference: str) -> list[tuple[Path, str | None]]:
    """Return the files of a reference, and the format that it names."""
    format, file = split_format(reference)
    path = Path(file)
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise InputError(f"task {reference}: the folder holds no .jsonl file")
        return [(file, format) for file in files]
    if path.is_file():
        return [(path, format)]
    if format is None and "/" not in reference and not path.suffix:
        raise InputError(
            f"task {reference!r} is not a file: evaluation during training accepts no names of lm-evaluation-harness "
            "tasks; give a local JSONL file (the columns of BLiMP, ARC, PIQA and LAMBADA can be read)"
        )
    prefix, _, rest = reference.partition(":")
    if rest and Path(rest).exists():
        near = get_close_matches(prefix, _PUBLISHED, 1)
        hint = f"did you mean `{near[0]}:`?" if near else f"the formats are {', '.join(_PUBLISHED)}"
        raise InputError(f"task {reference}: unknown format `{prefix}`; {hint}")
    raise InputError(f"task {reference}: no such file")


def _load_task(path: Path, format: str | None, limit: int | None) -> Task:
    rows = list(read_rows(path, limit))
    if not rows:
        raise InputError(f"{path}: no questions in it")
    format = format or _detect_format(path, rows[0][1])
    labels = _piqa_labels(path, rows) if format == "piqa" else [{}] * len(rows)
    questions = []
    for (where, row), label in zip(rows, labels, strict=True):
        try:
            question = replace(_READERS[format](row | label), cluster=row.get("cluster"))
        except KeyError as error:
            raise InputError(f"{where}: column {error} is missing (read as {format})") from None
        except (TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{where}: cannot be read as {format}: {error}") from None
        _check(question, where)
        questions.append(question)
    kind: Kind = "last_word" if format in ("last_word", "lambada") else "choice"
    return Task(_name(path), path, kind, tuple(questions))


def _name(path: Path) -> str:
    """Return the name of a file without `.jsonl` or `.jsonl.gz`."""
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def _detect_format(path: Path, row: JsonRow) -> str:
    """Return the only format whose columns are in a row."""
    matches = [
        format for format, alternatives in FORMATS.items() if any(columns <= row.keys() for columns in alternatives)
    ]
    if len(matches) == 1:
        return matches[0]
    if not matches and "text" in row:
        raise InputError(f"{path}: a `text` column alone is no task; write lambada:{path}, or give the file to --texts")
    raise InputError(
        f"{path}: columns {', '.join(row)} fit {' and '.join(matches) or 'no format'}; needed are context, choices, "
        f"answer or context, continuation (or one of the prefixes {', '.join(f'{p}:' for p in sorted(_PUBLISHED))})"
    )


def _check(question: Question, where: str) -> None:
    if not all(is_text(text) for text in (question.context, *question.contexts, *question.continuations)):
        raise InputError(f"{where}: context, choices and continuation must be texts")
    if any(length == 0 for length in question.lengths):
        raise InputError(f"{where}: an empty choice or continuation has no likelihood")
    if isinstance(question.answer, bool) or not isinstance(question.answer, int):
        raise InputError(f"{where}: the answer must be the index of a choice, not {question.answer!r}")
    if not 0 <= question.answer < len(question.continuations):
        raise InputError(
            f"{where}: answer {question.answer} is outside the {len(question.continuations)} choices (counted from 0)"
        )
    if question.cluster is not None and not (is_text(question.cluster) and question.cluster):
        raise InputError(f"{where}: the cluster must be a text or null, not {question.cluster!r}")


def _join_context(context: str, choices: Sequence[str], answer: int, delimiter: str = " ") -> Question:
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError("choices must be a list of at least two strings, not " + type(choices).__name__)
    return Question(context, tuple(delimiter + choice for choice in choices), answer, tuple(map(len, choices)))


def _read_arc(row: JsonRow) -> Question:
    if "answerKey" in row:
        choices = row["choices"]
        answer = choices["label"].index(row["answerKey"])
        return _join_context(f"Question: {row['question']}\nAnswer:", choices["text"], answer)
    return _join_context(row["query"], row["choices"], row["gold"] if "gold" in row else row["answer"])


def _read_sciq(row: JsonRow) -> Question:
    choices = [row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]]
    context = f"{row.get('support', '').lstrip()}\nQuestion: {row['question']}\nAnswer:"
    return _join_context(context, choices, 3)


def _read_winogrande(row: JsonRow) -> Question:
    """Read a sentence with a gap.

    Each option ends a context; the rest of the sentence is scored.
    """
    before, gap, rest = row["sentence"].partition("_")
    if not gap:
        raise ValueError("the sentence must have a gap, _")
    if str(row["answer"]) not in ("1", "2"):
        raise ValueError(f"the answer must be 1 or 2, not {row['answer']!r}")
    contexts = (before + row["option1"], before + row["option2"])
    rest = rest.strip()
    return Question(row["sentence"], (f" {rest}",) * 2, int(row["answer"]) - 1, (len(rest),) * 2, contexts=contexts)


def _read_lambada(row: JsonRow) -> Question:
    context, space, word = row["text"].rpartition(" ")
    if not space or not word:
        raise ValueError("the text must hold at least two words and end with one")
    return Question(context, (f" {word}",), 0, (len(word),))


def _piqa_labels(path: Path, rows: Sequence[tuple[str, JsonRow]]) -> list[JsonRow]:
    """Read the labels of PIQA, which are published in a second file."""
    if all("label" in row for _, row in rows):
        return [{}] * len(rows)
    file = path.with_name(f"{path.stem}-labels.lst")
    try:
        lines = file.read_text().split()
    except OSError:
        raise InputError(f"{path}: has no `label` column, and its answers are not in {file} either") from None
    if len(lines) < len(rows) or not set(lines) <= {"0", "1"}:
        raise InputError(f"{file}: must hold 0 or 1 for each question of {path.name}, one a line")
    return [{"label": int(label)} for label in lines[: len(rows)]]


_READERS: dict[str, Callable[[JsonRow], Question]] = {
    "choices": lambda row: _join_context(row["context"], row["choices"], row["answer"], ""),
    "last_word": lambda row: Question(row["context"], (row["continuation"],), 0, (len(row["continuation"]),)),
    "blimp": lambda row: _join_context("", [row["sentence_good"], row["sentence_bad"]], 0),
    "arc": _read_arc,
    "piqa": lambda row: _join_context(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"]),
    "lambada": _read_lambada,
    "sciq": _read_sciq,
    "winogrande": _read_winogrande,
}
_PUBLISHED = ("arc", "blimp", "lambada", "piqa", "sciq", "winogrande")
FORMATS: dict[str, list[set[str]]] = {
    "choices": [{"context", "choices", "answer"}],
    "last_word": [{"context", "continuation"}],
    "blimp": [{"sentence_good", "sentence_bad"}],
    "arc": [{"query", "choices", "gold"}, {"query", "choices", "answer"}, {"question", "choices", "answerKey"}],
    "piqa": [{"goal", "sol1", "sol2"}],
    "sciq": [{"question", "distractor1", "distractor2", "distractor3", "correct_answer"}],
    "winogrande": [{"sentence", "option1", "option2", "answer"}],
}
"""Columns by which a format is detected. PIQA also needs `label` or the file `NAME-labels.lst`. LAMBADA (column `text`)
must be named."""
