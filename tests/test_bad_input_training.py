"""Invalid input of training: exit code 2, one sentence with the cause, no output."""

from functools import partial
from pathlib import Path

import pytest
from bad_input import Case, CaseFunction, ValidInput, Workspace, assert_one_error_sentence, flip_byte, register_case

CASES: list[CaseFunction] = []
case = partial(register_case, CASES)


@case
def corrupted_shard(p: Workspace) -> Case:
    corpus = p.corpus()
    flip_byte(corpus / "shard-000000.parquet")
    return p.train(corpus=corpus), "shard-000000.parquet"


@case
def missing_shard(p: Workspace) -> Case:
    corpus = p.corpus()
    (corpus / "shard-000000.parquet").unlink()
    return p.train(corpus=corpus), "shard-000000.parquet"


@case
def corpus_without_manifest(p: Workspace) -> Case:
    corpus = p.corpus()
    (corpus / "corpus.json").unlink()
    return p.train(corpus=corpus), "corpus.json"


@case
def wrong_tokenizer(p: Workspace) -> Case:
    return p.train(model=p.valid.other), "tokenizer"


@case
def rows_longer_than_the_model(p: Workspace) -> Case:
    return p.train("--seq-len", 65), "64"


@case
def batch_that_does_not_divide(p: Workspace) -> Case:
    return p.train("--grad-accum", 3, "--mesh", "data=1"), "multiple"


@case
def negative_learning_rate(p: Workspace) -> Case:
    return p.train("--learning-rate", -1), "learning-rate"


@case
def mixture_without_a_share(p: Workspace) -> Case:
    return p.train("--mixture", p.valid.corpus), "FOLDER=SHARE"


@case
def mixture_with_shares_of_one(p: Workspace) -> Case:
    return p.train("--mixture", "a=0.5", "b=0.5"), "sum to 1"


@case
def missing_mixed_corpus(p: Workspace) -> Case:
    return p.train("--mixture", f"{p.folder / 'no-corpus'}=0.1"), "no-corpus"


@case
def corrupted_shard_of_a_mixed_corpus(p: Workspace) -> Case:
    corpus = p.corpus()
    flip_byte(corpus / "shard-000000.parquet")
    return p.train("--mixture", f"{corpus}=0.1"), f"{corpus}/shard-000000.parquet"


@case
def corpus_mixed_with_itself(p: Workspace) -> Case:
    return p.train("--mixture", f"{p.valid.corpus}/=0.1"), "the same corpus"


@case
def zero_max_epochs(p: Workspace) -> Case:
    return p.train("--max-epochs", 0), "max-epochs"


@case
def evaluation_without_an_interval(p: Workspace) -> Case:
    return p.train("--eval-texts", p.valid.texts), "--eval-every"


@case
def nothing_to_evaluate(p: Workspace) -> Case:
    return p.train("--eval-every", 2), "nothing to evaluate"


@case
def missing_file_to_evaluate(p: Workspace) -> Case:
    return p.train("--eval-every", 2, "--eval-texts", p.folder / "gone.jsonl"), "gone.jsonl"


@case
def malformed_task_to_evaluate(p: Workspace) -> Case:
    task = p.file("task.jsonl", '{"context": "a", "choices": ["b", "c"], "answer": 2}\n')
    return p.train("--eval-every", 2, "--eval-tasks", task), "task.jsonl:1"


@case
def lora_target_that_does_not_exist(p: Workspace) -> Case:
    return p.train("--lora-rank", 2, "--lora-targets", "qkv"), "--lora-targets qkv"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_invalid_input_is_one_error_sentence(case: CaseFunction, valid: ValidInput, tmp_path: Path, capsys):
    assert_one_error_sentence(case, Workspace(valid, tmp_path), capsys)
