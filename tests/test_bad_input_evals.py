"""Invalid input of evaluations, runs and reports: exit code 2, one sentence with the cause, no output."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from bad_input import (
    Case,
    CaseFunction,
    ValidInput,
    Workspace,
    assert_one_error_sentence,
    register_case,
    rewrite_json,
    save_sequences,
)

from jax_selftrain import cli

CASES: list[CaseFunction] = []
case = partial(register_case, CASES)


@case
def missing_task_file(p: Workspace) -> Case:
    return p.score("--tasks", p.folder / "no-task.jsonl"), "no-task.jsonl"


@case
def malformed_task_line(p: Workspace) -> Case:
    return p.score("--tasks", p.file("t.jsonl", '{"context": "a", "choices": [" b", " c"]}\n')), "answer"


@case
def answer_outside_the_choices(p: Workspace) -> Case:
    line = '{"context": "a", "choices": [" b", " c"], "answer": 7}\n'
    return p.score("--tasks", p.file("t.jsonl", line)), "7"


@case
def nothing_to_score(p: Workspace) -> Case:
    return p.score(), "tasks"


@case
def comparison_with_a_missing_result(p: Workspace) -> Case:
    return p.compare(p.valid.scores, student="gone.json"), "gone.json"


@case
def comparison_with_something_else(p: Workspace) -> Case:
    return p.compare(p.valid.scores, student="student.timings.json"), "is not a result of `jax-selftrain score`"


@case
def comparison_without_items(p: Workspace) -> Case:
    scores = p.scores()
    (scores / "student.items.parquet").unlink()
    return p.compare(scores), "student.items.parquet"


@case
def comparison_of_truncated_items(p: Workspace) -> Case:
    scores = p.scores()
    file = scores / "student.items.parquet"
    file.write_bytes(file.read_bytes()[:-40])
    return p.compare(scores), "student.items.parquet"


@case
def comparison_with_items_of_another_result(p: Workspace) -> Case:
    scores = p.scores()
    shutil.copy(scores / "base.items.parquet", scores / "student.items.parquet")
    return p.compare(scores), "student.items.parquet: does not match student.json"


@case
def comparison_with_other_task_files(p: Workspace) -> Case:
    scores = p.scores()
    rewrite_json(scores / "student.json", lambda result: result["fingerprints"]["files"].update(task="0" * 64))
    return p.compare(scores), "task differs"


@case
def comparison_with_other_tasks(p: Workspace) -> Case:
    scores = p.scores()
    options = ["--tasks", p.valid.task, "--texts", p.valid.texts, "--text-limit", 1]
    scoring = ["score", "--model", p.valid.model, "--out", scores / "more.json", "--mesh", "data=1", *options]
    assert cli.main([str(word) for word in scoring]) == 0
    return p.compare(scores, student="more.json"), "base.json: texts was not scored"


@case
def comparison_without_a_margin(p: Workspace) -> Case:
    return p.compare(p.valid.scores, "--margin-task", 0), "--margin-task 0"


@case
def comparison_with_an_unknown_primary_task(p: Workspace) -> Case:
    return p.compare(p.valid.scores, "--primary-tasks", "tusk"), "did you mean `task`"


@case
def comparison_with_unpaired_files(p: Workspace) -> Case:
    files = [p.valid.scores / "base.json"] * 2
    students = [p.valid.scores / "student.json"] * 3
    return ["compare", "--base", *files, "--student", *students, "--out", p.result], "cannot be paired"


@case
def comparison_of_one_student_twice(p: Workspace) -> Case:
    students = [p.valid.scores / "student.json"] * 2
    return [
        "compare",
        p.valid.scores / "base.json",
        "--student",
        *students,
        "--out",
        p.result,
    ], "one checkpoint is one seed"


@case
def pickled_sequences(p: Workspace) -> Case:
    return p.extract(save_sequences(p, np.array([[1, 2], None], dtype=object))), "sequences.npy"


@case
def sequences_of_floats(p: Workspace) -> Case:
    return p.extract(save_sequences(p, np.ones((4, 16)))), "sequences.npy"


@case
def sequences_too_short(p: Workspace) -> Case:
    return p.extract(save_sequences(p, np.ones((4, 15), np.int32))), "16"


@case
def sequences_outside_the_vocabulary(p: Workspace) -> Case:
    return p.extract(save_sequences(p, np.full((4, 16), 9999))), "9999"


@case
def sequences_longer_than_the_model(p: Workspace) -> Case:
    return p.extract(save_sequences(p, np.ones((4, 100), np.int32)), "--prefix", 40, "--suffix", 40), "64"


@case
def sequences_longer_than_the_model_behind_bos(p: Workspace) -> Case:
    words = ("--prefix", 32, "--suffix", 32, "--start-token", "bos")
    return p.extract(save_sequences(p, np.ones((4, 64), np.int32)), *words), "start token"


@case
def lengths_that_contradict_the_protocol(p: Workspace) -> Case:
    return p.extract(save_sequences(p, np.ones((4, 64), np.int32)), "--protocol", "pythia"), "--prefix 8 contradicts"


@case
def unknown_protocol(p: Workspace) -> Case:
    return p.extract(save_sequences(p, np.ones((4, 64), np.int32)), "--protocol", "pythias"), "pythia"


@case
def offset_beyond_all_sequences(p: Workspace) -> Case:
    return p.extract(save_sequences(p, np.ones((4, 20), np.int32)), "--offset", 5), "--offset 5"


@case
def negative_offset(p: Workspace) -> Case:
    return p.extract(save_sequences(p, np.ones((4, 20), np.int32)), "--offset", -1), "--offset"


@case
def invalid_sampling_policy(p: Workspace) -> Case:
    return p.extract(
        save_sequences(p, np.ones((4, 16), np.int32)), "--sampling-policies", "topk=40"
    ), "--sampling-policies topk=40"


@case
def base_without_verify(p: Workspace) -> Case:
    return p.extract(save_sequences(p, np.ones((4, 16), np.int32)), "--base", p.valid.model), "--verify"


@case
def baseline_with_another_tokenizer(p: Workspace) -> Case:
    return p.extract(
        save_sequences(p, np.ones((4, 16), np.int32)), "--untrained-baseline", p.valid.other
    ), "--untrained-baseline"


@case
def missing_controls(p: Workspace) -> Case:
    return p.extract(
        save_sequences(p, np.ones((4, 16), np.int32)), "--control-sequences", p.folder / "gone.npy"
    ), "gone.npy"


@case
def too_few_duplicates(p: Workspace) -> Case:
    np.save(p.folder / "copies.npy", np.ones(3, np.int32))
    return p.extract(
        save_sequences(p, np.ones((4, 16), np.int32)), "--duplicate-counts", p.folder / "copies.npy"
    ), "copies.npy"


@case
def sequences_too_short_in_parquet(p: Workspace) -> Case:
    return p.extract(p.valid.corpus / "shard-000000.parquet", "--prefix", 60, "--suffix", 4), "fewer than prefix"


@case
def invalid_parquet(p: Workspace) -> Case:
    return p.extract(p.file("rows.parquet", b"PAR1 and nothing more")), "rows.parquet"


@case
def folder_without_sequences(p: Workspace) -> Case:
    (p.folder / "nothing").mkdir()
    return p.extract(p.folder / "nothing"), "nothing"


@case
def missing_suffix_file(p: Workspace) -> Case:
    return p.extract(Path(f"{save_sequences(p, np.ones((4, 16), np.int32))}:{p.folder / 'suffix.npy'}")), "suffix.npy"


@case
def windows_longer_than_the_model(p: Workspace) -> Case:
    return p.extract_windows("--window", 60, "--prefix", 5), "--prefix 5 and --window 60 are longer"


@case
def windows_longer_than_the_model_behind_bos(p: Workspace) -> Case:
    words = ("--window", 32, "--prefix", 32, "--start-token", "bos")
    return p.extract_windows(*words), "after the start token"


@case
def windows_longer_than_every_document(p: Workspace) -> Case:
    return p.extract_windows("--window", 30, "--prefix", 30), "no document has the 60 tokens"


@case
def windows_without_a_stride(p: Workspace) -> Case:
    return p.extract_windows("--stride", 0), "--stride 0"


@case
def windows_of_sequences(p: Workspace) -> Case:
    return p.extract_windows("--sequences", p.valid.task), "unknown option `--sequences`"


@case
def windows_with_a_maximum_below_the_minimum(p: Workspace) -> Case:
    return p.extract_windows("--window", 8, "--prefix", 8, "--max-prefix", 7), "--max-prefix 7 is shorter"


@case
def windows_with_a_base_of_another_tokenizer(p: Workspace) -> Case:
    return p.extract_windows("--window", 8, "--prefix", 8, "--base", p.valid.other), "--base"


@case
def windows_of_two_files_of_one_name(p: Workspace) -> Case:
    words = ("--window", 4, "--prefix", 4, "--texts", p.valid.texts, p.valid.texts)
    return p.extract_windows(*words), "two files to score are named 'texts'"


@case
def windows_of_a_missing_file(p: Workspace) -> Case:
    return p.extract_windows("--window", 4, "--prefix", 4, "--texts", p.folder / "gone.jsonl"), "gone.jsonl"


@case
def leakage_of_text_without_a_tokenizer(p: Workspace) -> Case:
    return p.leakage(p.valid.texts), "--tokenizer"


@case
def leakage_by_another_tokenizer(p: Workspace) -> Case:
    return p.leakage(p.valid.texts, "--tokenizer", p.valid.other), "--tokenizer"


@case
def leakage_of_a_missing_text(p: Workspace) -> Case:
    return p.leakage(p.folder / "gone.jsonl"), "gone.jsonl"


@case
def leakage_with_min_match_zero(p: Workspace) -> Case:
    return p.leakage(p.valid.corpus, "--min-match", 0), "--min-match"


@case
def leakage_without_the_text_field(p: Workspace) -> Case:
    texts = p.file("texts.jsonl", '{"text": "fine"}\n{"story": "not"}\n')
    return p.leakage(texts, "--tokenizer", p.valid.model), "texts.jsonl:2"


@case
def leakage_of_negative_token_ids(p: Workspace) -> Case:
    return p.leakage(save_sequences(p, np.array([3, -1]))), "sequences.npy"


@case
def leakage_of_pickled_tokens(p: Workspace) -> Case:
    return p.leakage(save_sequences(p, np.array([{}], dtype=object))), "sequences.npy"


@case
def membership_of_a_table_without_records(p: Workspace) -> Case:
    table = p.valid.scores / "base.items.parquet"
    return [
        "membership",
        "--records",
        table,
        "--members",
        "a",
        "--nonmembers",
        "b",
        "--out",
        p.result,
    ], "--token-records"


@case
def token_gap_of_a_missing_file(p: Workspace) -> Case:
    return ["token-gap", "--base", p.folder / "gone.parquet", "--student", "x", "--out", p.result], "gone.parquet"


@case
def token_records_of_tasks(p: Workspace) -> Case:
    return p.score("--tasks", p.valid.task, "--token-records"), "--token-records records the tokens of --texts"


@case
def run_that_sets_the_source_of_its_stage(p: Workspace) -> Case:
    yaml = f"model: {p.valid.model}\nsample: {{model: elsewhere}}\nscore: {{texts: [{p.valid.texts}]}}\n"
    return ["run", "--config", p.file("run.yaml", yaml), "--out", p.out], "sample.model"


@case
def run_with_a_missing_task(p: Workspace) -> Case:
    yaml = (
        f"model: {p.valid.model}\nscore: {{tasks: [gone.jsonl]}}\nsample: {{max_tokens: 8}}\ntrain: {{seq_len: 16}}\n"
    )
    return ["run", "--config", p.file("run.yaml", yaml), "--out", p.out], "gone.jsonl"


@case
def report_of_an_empty_folder(p: Workspace) -> Case:
    (p.folder / "empty").mkdir()
    return ["report", p.folder / "empty"], "empty"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_invalid_input_is_one_error_sentence(case: CaseFunction, valid: ValidInput, tmp_path: Path, capsys):
    assert_one_error_sentence(case, Workspace(valid, tmp_path), capsys)
