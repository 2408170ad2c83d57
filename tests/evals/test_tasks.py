"""Task files: prompts of each format, metrics, refused files."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jax_selftrain.errors import InputError
from jax_selftrain.evals import load_tasks, load_texts, paths_by_name
from jax_selftrain.evals.item_results import REQUESTS, select_items, tabulate_items
from jax_selftrain.evals.tasks import Task, task_metrics
from jax_selftrain.likelihood import Likelihood


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(reference: str):
    return load_tasks([reference])[0].questions


def compute_metrics(task: Task, answers: list[list[Likelihood]]) -> dict:
    rows = [
        {"task": task.name, "doc": doc, "choice": choice, **likelihood._asdict()}
        for doc, choices in enumerate(answers)
        for choice, likelihood in enumerate(choices)
    ]
    items = tabulate_items([task], {}, pa.Table.from_pylist(rows, schema=REQUESTS))
    return task_metrics(select_items(items, task.name))


def likelihoods(*values: float, greedy: bool = False) -> list[Likelihood]:
    return [Likelihood(value, greedy, 1) for value in values]


def test_our_formats_join_without_a_separator(tmp_path):
    (choice,) = questions(
        write(tmp_path / "own.jsonl", {"context": "Q: a?\nA:", "choices": [" yes", " no"], "answer": 1})
    )
    assert (choice.context, choice.continuations, choice.answer) == ("Q: a?\nA:", (" yes", " no"), 1)
    assert choice.lengths == (4, 3)
    (word,) = questions(write(tmp_path / "word.jsonl", {"context": "the cat", "continuation": " sat"}))
    assert (word.context, word.continuations, word.answer) == ("the cat", (" sat",), 0)


@pytest.mark.parametrize("prefix", ["blimp:", ""])
def test_blimp_scores_sentences_without_context(tmp_path, prefix):
    file = write(tmp_path / "b.jsonl", {"sentence_good": "She runs.", "sentence_bad": "She run.", "UID": "x"})
    (pair,) = questions(prefix + file)
    # lm-evaluation-harness puts its target delimiter, one space, before the sentence although the context is empty.
    assert (pair.context, pair.continuations, pair.answer) == ("", (" She runs.", " She run."), 0)
    assert pair.lengths == (9, 8)


@pytest.mark.parametrize("prefix", ["arc:", ""])
@pytest.mark.parametrize(
    "row",
    [
        {"query": "Question: why?\nAnswer:", "choices": ["so", "not"], "gold": 1},
        {"query": "Question: why?\nAnswer:", "choices": ["so", "not"], "answer": 1},
        {"question": "why?", "choices": {"text": ["so", "not"], "label": ["A", "B"]}, "answerKey": "B"},
    ],
)
def test_arc_puts_one_space_before_the_choice(tmp_path, prefix, row):
    (question,) = questions(prefix + write(tmp_path / "a.jsonl", row))
    assert question.context == "Question: why?\nAnswer:"
    assert question.continuations == (" so", " not")
    assert question.answer == 1
    assert question.lengths == (2, 3)


def test_piqa_takes_its_answers_from_the_labels_file(tmp_path):
    file = write(tmp_path / "v.jsonl", {"goal": "g", "sol1": "a", "sol2": "b"}, {"goal": "h", "sol1": "c", "sol2": "d"})
    with pytest.raises(InputError, match=r"v-labels\.lst"):
        load_tasks([file])
    (tmp_path / "v-labels.lst").write_text("1\n0\n")
    first, second = questions(file)
    assert (first.context, first.continuations, first.answer) == ("Question: g\nAnswer:", (" a", " b"), 1)
    assert second.answer == 0


def test_lambada_predicts_the_last_word_with_its_space(tmp_path):
    file = write(tmp_path / "l.jsonl", {"text": "one two\nthree  four"})
    (word,) = questions(f"lambada:{file}")
    assert (word.context, word.continuations) == ("one two\nthree ", (" four",))
    with pytest.raises(InputError, match=r"lambada:.*--texts"):
        load_tasks([file])


def test_a_folder_is_all_its_files_by_name_and_limit_takes_the_first_questions(tmp_path):
    row = {"sentence_good": "a b", "sentence_bad": "b a"}
    write(tmp_path / "two.jsonl", row, row, row)
    write(tmp_path / "one.jsonl", row)
    tasks = load_tasks([f"blimp:{tmp_path}"], limit=2)
    assert [(task.name, len(task.questions)) for task in tasks] == [("one", 1), ("two", 2)]


def test_accuracy_and_its_standard_error_are_those_of_the_harness(tmp_path):
    rows = [{"context": "c", "choices": [" aaaa", " b"], "answer": i % 2} for i in range(4)]
    (task,) = load_tasks([write(tmp_path / "t.jsonl", *rows)])
    # By sum, choices 1, 1, 0, 1 win; divided by 5 and 2 characters, choices 0, 1, 0, 0.
    answers = [likelihoods(-3.0, -2.0), likelihoods(-9.0, -2.0), likelihoods(-1.0, -2.0), likelihoods(-4.0, -2.0)]
    metrics = compute_metrics(task, answers)
    assert metrics["n"] == 4
    assert metrics["acc"] == 0.75
    assert metrics["acc_norm"] == 0.75
    assert metrics["acc_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3), rel=1e-12)  # √(p(1−p)/(n−1))
    assert metrics["chance"] == 0.5


def test_last_word_perplexity_is_exp_of_the_mean_and_its_error_follows(tmp_path):
    (task,) = load_tasks([write(tmp_path / "w.jsonl", *[{"context": "a", "continuation": " b"}] * 3)])
    values = np.array([-1.0, -2.0, -4.5])
    metrics = compute_metrics(task, [likelihoods(value, greedy=value > -2) for value in values])
    assert metrics["acc"] == pytest.approx(1 / 3)
    assert metrics["perplexity"] == pytest.approx(math.exp(2.5))
    assert metrics["perplexity_stderr"] == pytest.approx(math.exp(2.5) * values.std(ddof=1) / math.sqrt(3))


def test_winogrande_is_prompted_as_in_the_harness(tmp_path):
    harness = pytest.importorskip("lm_eval.tasks.winogrande.preprocess_winogrande")
    row = {
        "sentence": "The lamp fits the box: the _ is small .",
        "option1": "lamp",
        "option2": "box",
        "answer": "1",
    }
    (question,) = questions(write(tmp_path / "dev.jsonl", row | {"qID": "3"}))
    assert list(question.contexts) == harness.doc_to_choice(row)
    assert set(question.continuations) == {" " + harness.doc_to_target(row)}
    assert question.answer == harness.doc_to_text(row)
    with pytest.raises(InputError, match="the answer must be 1 or 2, not ''"):
        questions(write(tmp_path / "test.jsonl", row | {"answer": ""}))


def test_sciq_is_read_as_published_and_prompted_as_in_the_harness(tmp_path):
    row = {
        "question": "What do lamps need?",
        "distractor3": "rain",
        "distractor1": "snow",
        "distractor2": "wind",
        "correct_answer": "oil",
        "support": " Lamps burn oil.",
    }
    (tmp_path / "sciq.json").write_text(json.dumps([row, row | {"support": ""}], indent=1))
    first, second = questions(str(tmp_path / "sciq.json"))
    assert first.context == "Lamps burn oil.\nQuestion: What do lamps need?\nAnswer:"
    assert (first.continuations, first.answer) == ((" snow", " wind", " rain", " oil"), 3)
    assert second.context == "\nQuestion: What do lamps need?\nAnswer:"


def test_texts_are_read_from_every_format(tmp_path):
    texts = ["One lamp.\n", "Two lamps.\n"]
    rows = [{"text": text} for text in texts]
    plain = write(tmp_path / "a.jsonl", *rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(Path(plain).read_bytes()))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    pq.write_table(pa.table({"text": texts, "id": [1, 2]}), tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.parquet"):
        (task,) = load_texts([str(tmp_path / name)])
        assert task.documents == texts
    (tmp_path / "wiki.test.raw").write_text("".join(texts))
    (task,) = load_texts([str(tmp_path / "wiki.test.raw")])
    assert (task.name, task.documents) == ("wiki.test.raw", ["".join(texts)])


def test_perplexities_beyond_float64_are_none(tmp_path):
    (task,) = load_tasks([write(tmp_path / "w.jsonl", *[{"context": "a", "continuation": " b"}] * 2)])
    metrics = compute_metrics(task, [likelihoods(-800.0), likelihoods(-900.0)])
    assert metrics == {"n": 2, "acc": 0, "acc_stderr": 0, "perplexity": None, "perplexity_stderr": None}


@pytest.mark.parametrize("name", ["context", "query"])
def test_a_mapping_of_choices_is_no_list_of_choices(tmp_path, name):
    choices = {"text": [" mat", " moon", " sun"], "label": ["A", "B", "C"]}
    file = write(tmp_path / "t.jsonl", {name: "The cat sat on the", "choices": choices, "answer": 0})
    with pytest.raises(InputError, match=r"t.jsonl:1: .* choices must be a list of at least two strings, not dict"):
        load_tasks([file])


def test_one_question_has_no_standard_error(tmp_path):
    (task,) = load_tasks([write(tmp_path / "w.jsonl", {"context": "a", "continuation": " b"})])
    assert compute_metrics(task, [likelihoods(-1.0)])["acc_stderr"] is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"context": "c", "choices": ["a", "b"], "answer": 2}, "answer 2 is outside the 2 choices"),
        ({"context": "c", "choices": ["a", "b"], "answer": "a"}, "index of a choice"),
        ({"context": "c", "choices": ["a", "b"], "answer": True}, "index of a choice"),
        ({"context": "c", "choices": ["a", ""], "answer": 0}, "empty choice"),
        ({"context": "c", "choices": ["a"], "answer": 0}, "at least two"),
        ({"context": "c", "choices": "ab", "answer": 0}, "list of at least two"),
        ({"context": 3, "choices": ["a", "b"], "answer": 0}, "must be texts"),
        ({"context": "c", "choices": ["a", "\ud800"], "answer": 0}, "must be texts"),
        ({"prompt": "c"}, "fit no format"),
        ({"context": "c", "continuation": " d", "choices": ["a", "b"], "answer": 0}, "choices and last_word"),
        ([1], "list instead of a JSON object"),
    ],
)
def test_a_malformed_question_is_refused_with_file_and_line(tmp_path, row, message):
    file = write(tmp_path / "bad.jsonl", row)
    with pytest.raises(InputError, match=message) as error:
        load_tasks([file])
    assert file in str(error.value)


def test_a_later_line_of_another_format_is_named(tmp_path):
    file = write(tmp_path / "mixed.jsonl", {"context": "a", "continuation": " b"}, {"context": "a", "target": " b"})
    with pytest.raises(InputError, match=r"mixed\.jsonl:2: column 'continuation' is missing"):
        load_tasks([file])


def test_missing_files_and_harness_task_names_are_distinguished(tmp_path):
    with pytest.raises(InputError, match="evaluation during training accepts no names of lm-evaluation"):
        load_tasks(["arc_easy"])
    with pytest.raises(InputError, match="no such file"):
        load_tasks([str(tmp_path / "nothing.jsonl")])
    with pytest.raises(InputError, match=r"holds no \.jsonl"):
        load_tasks([str(tmp_path)])
    (tmp_path / "broken.jsonl").write_text('{"context": "a"\n')
    with pytest.raises(InputError, match=r"broken\.jsonl:1: not a line of JSON"):
        load_tasks([str(tmp_path / "broken.jsonl")])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="no questions"):
        load_tasks([str(tmp_path / "empty.jsonl")])
    (tmp_path / "latin.jsonl").write_bytes('{"context": "é"}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.jsonl:1: not a line of JSON"):
        load_tasks([str(tmp_path / "latin.jsonl")])


def test_two_tasks_of_one_name_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    row = {"context": "a", "continuation": " b"}
    first, second = write(tmp_path / "t.jsonl", row), write(tmp_path / "a" / "t.jsonl", row)
    with pytest.raises(InputError, match=r"two files to score are named 't' \(.*t\.jsonl and .*t\.jsonl\)"):
        paths_by_name(load_tasks([first, second]))


def test_blank_texts_are_skipped_and_lines_without_text_refused(tmp_path):
    (file,) = load_texts([write(tmp_path / "x.jsonl", {"text": "a"}, {"text": " \n"}, {"text": "b"})])
    assert [question.continuations for question in file.questions] == [("a",), ("b",)]
    with pytest.raises(InputError, match=r"y\.jsonl:1: no text"):
        load_texts([write(tmp_path / "y.jsonl", {"story": "a"})])
    with pytest.raises(InputError, match="no texts in it"):
        load_texts([write(tmp_path / "z.jsonl", {"text": ""})])


def test_published_files_are_read_as_they_are(data_dir):
    folder = data_dir / "benchmarks"
    references = [
        f"blimp:{folder / 'blimp'}",
        *(str(folder / f"{name}.jsonl") for name in ("arc_easy_test", "piqa_valid")),
    ]
    tasks = load_tasks([*references, f"lambada:{folder / 'lambada_test.jsonl'}"])
    sizes = {task.name: len(task.questions) for task in tasks}
    assert len(sizes) == 11
    assert {sizes.pop(name) for name in ("arc_easy_test",)} == {2376}
    assert sizes.pop("piqa_valid") == 1838
    assert sizes.pop("lambada_test") == 5153
    assert set(sizes.values()) == {1000}
