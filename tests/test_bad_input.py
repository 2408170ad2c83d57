"""Invalid input: exit code 2, one sentence with the cause, no output.

Every case runs a command on files; each mistake is made in a fresh copy of valid input.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from models_factory import write_tiny_hf_model
from safetensors.numpy import load_file, save_file

from jax_selftrain import cli


@dataclass(frozen=True)
class ValidInput:
    """Valid input, shared by all cases and never changed."""

    model: Path
    other: Path
    """A model with another tokenizer."""
    corpus: Path
    texts: Path
    scores: Path
    """A folder with `base.json` and `student.json`, two results of `score`."""


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> ValidInput:
    folder = tmp_path_factory.mktemp("valid")
    model = write_tiny_hf_model(folder / "model", "llama", vocab_size=128, max_position_embeddings=64)
    other = write_tiny_hf_model(folder / "other", "llama", vocab_size=160, max_position_embeddings=64)
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"The cat number {i} sat on the mat."}) + "\n" for i in range(20)))
    assert cli.main(["import", str(texts), "--model", str(model), "--out", str(folder / "corpus")]) == 0
    task = folder / "task.jsonl"
    task.write_text('{"context": "The cat", "choices": [" sat on", " mat number"], "answer": 0}\n' * 4)
    scoring = ["score", "--tasks", str(task), "--mesh", "data=1", "--batch-tokens", "512"]
    student = write_tiny_hf_model(folder / "student", "llama", seed=1, vocab_size=128, max_position_embeddings=64)
    for name, scored in (("base", model), ("student", student)):
        assert cli.main([*scoring, "--model", str(scored), "--out", str(folder / "scores" / f"{name}.json")]) == 0
    return ValidInput(model, other, folder / "corpus", texts, folder / "scores")


@dataclass(frozen=True)
class Workspace:
    """Folder of one case, with commands on it."""

    valid: ValidInput
    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def model(self) -> Path:
        """A copy of the model, to be damaged."""
        return Path(shutil.copytree(self.valid.model, self.folder / "model"))

    def corpus(self) -> Path:
        """A copy of the corpus, to be damaged."""
        return Path(shutil.copytree(self.valid.corpus, self.folder / "corpus"))

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def sample(self, model: Path, *more: object) -> list[object]:
        length = () if "--max-tokens" in more else ("--max-tokens", 8)
        return ["sample", "--model", model, "--out", self.out, "--samples", 4, *length, *more]

    def train(self, *more: object, model: Path | None = None, corpus: Path | None = None) -> list[object]:
        where = ("--model", model or self.valid.model, "--corpus", corpus or self.valid.corpus, "--out", self.out)
        length = () if "--seq-len" in more else ("--seq-len", 16)
        return ["train", *where, "--batch-size", 8, *length, *more]

    def merge(self, student: Path, weight: object) -> list[object]:
        return ["merge", "--base", self.valid.model, "--student", student, "--weight", weight, "--out", self.out]

    def score(self, *more: object) -> list[object]:
        return ["score", "--model", self.valid.model, "--out", self.out, *more]

    def scores(self) -> Path:
        """A copy of two results of `score`, to be damaged."""
        return Path(shutil.copytree(self.valid.scores, self.folder / "scores"))

    def compare(self, scores: Path, *more: object, student: str = "student.json") -> list[object]:
        return ["compare", scores / "base.json", scores / student, "--out", self.out, *more]

    def extract(self, sequences: Path, *more: object) -> list[object]:
        where = ("--model", self.valid.model, "--sequences", sequences, "--out", self.out)
        lengths = () if "--prefix" in more else ("--prefix", 8, "--suffix", 8)
        return ["extract", *where, *lengths, *more]

    def leakage(self, texts: Path, *more: object) -> list[object]:
        return ["leakage", "--corpus", self.valid.corpus, "--texts", texts, "--out", self.out, *more]


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_weights(model: Path, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def nan_weight(weights: dict[str, np.ndarray]) -> None:
    weights["model.norm.weight"][3] = np.nan


def npy(workspace: Workspace, array: np.ndarray) -> Path:
    np.save(workspace.folder / "sequences.npy", array)
    return workspace.folder / "sequences.npy"


# ------------------------------------------------------------------ cases: (command, words of the error sentence)

Case = tuple[list[object], str]
CASES: list[Callable[[Workspace], Case]] = []


def case(function: Callable[[Workspace], Case]) -> Callable[[Workspace], Case]:
    """Register a case."""
    CASES.append(function)
    return function


@case
def unknown_command(p: Workspace) -> Case:
    return ["smaple"], "sample"


@case
def unknown_flag(p: Workspace) -> Case:
    return p.sample(p.valid.model, "--temprature", 1), "--temperature"


@case
def unknown_config_key(p: Workspace) -> Case:
    return [
        "sample",
        "--config",
        p.file("c.yaml", f"model: {p.valid.model}\nout: {p.out}\nmax_token: 8\n"),
    ], "max_tokens"


@case
def wrong_type_in_config(p: Workspace) -> Case:
    return ["sample", "--config", p.file("c.yaml", f"model: {p.valid.model}\nout: {p.out}\nsamples: many\n")], "samples"


@case
def config_is_not_yaml(p: Workspace) -> Case:
    return ["sample", "--config", p.file("c.yaml", "model: [unclosed\n")], "c.yaml"


@case
def missing_config_file(p: Workspace) -> Case:
    return ["sample", "--config", p.folder / "nowhere.yaml"], "nowhere.yaml"


@case
def unset_variable_in_config(p: Workspace) -> Case:
    return ["sample", "--config", p.file("c.yaml", "model: ${NO_SUCH_VARIABLE_HERE}/m\n")], "NO_SUCH_VARIABLE_HERE"


@case
def missing_required_option(p: Workspace) -> Case:
    return ["sample", "--model", p.valid.model], "--out"


@case
def missing_model(p: Workspace) -> Case:
    return p.sample(p.folder / "no-model"), "no-model"


@case
def truncated_safetensors(p: Workspace) -> Case:
    file = p.model() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return p.sample(file.parent), "model.safetensors"


@case
def pickle_checkpoint(p: Workspace) -> Case:
    model = p.model()
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"weights": [1, 2, 3]}))
    return p.sample(model), "save_pretrained"


@case
def unknown_architecture(p: Workspace) -> Case:
    model = p.model()
    rewrite(model / "config.json", lambda config: config.update(model_type="mamba"))
    return p.sample(model), "mamba"


@case
def unhandled_config_key(p: Workspace) -> Case:
    model = p.model()
    rewrite(model / "config.json", lambda config: config.update(mysterious_scaling=2.0))
    return p.sample(model), "mysterious_scaling"


@case
def dynamic_rope(p: Workspace) -> Case:
    model = p.model()
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    rewrite(model / "config.json", lambda config: config.update(rope_parameters=rope))
    return p.sample(model), "dynamic"


@case
def damaged_model_config(p: Workspace) -> Case:
    model = p.model()
    (model / "config.json").write_text('{"model_type": "llama", ')
    return p.sample(model), "config.json"


@case
def nan_weights(p: Workspace) -> Case:
    return p.sample(change_weights(p.model(), nan_weight)), "model.norm.weight"


@case
def missing_tensor(p: Workspace) -> Case:
    return p.sample(change_weights(p.model(), lambda w: w.pop("model.norm.weight"))), "model.norm.weight"


@case
def unexpected_tensor(p: Workspace) -> Case:
    return p.sample(change_weights(p.model(), lambda w: w.update(adapter=np.ones(3, np.float32)))), "adapter"


@case
def misshapen_tensor(p: Workspace) -> Case:
    weights = {"model.norm.weight": np.ones(7, np.float32)}
    return p.sample(change_weights(p.model(), lambda w: w.update(weights))), "model.norm.weight"


@case
def model_without_tokenizer(p: Workspace) -> Case:
    model = p.model()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model / file).unlink()
    return ["import", p.valid.texts, "--model", model, "--out", p.out], "tokenizer"


@case
def flipped_byte_in_an_orbax_tree(p: Workspace) -> Case:
    ours = p.folder / "ours"
    assert cli.main(["convert", str(p.valid.model), str(ours)]) == 0
    largest = max((f for f in (ours / "params").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    flip_byte(largest)
    return p.sample(ours), largest.name


@case
def more_devices_than_there_are(p: Workspace) -> Case:
    return p.sample(p.valid.model, "--mesh", "data=512"), "512"


@case
def mesh_larger_than_the_machine(p: Workspace) -> Case:
    return p.sample(p.valid.model, "--mesh", "model=500"), "needs 500 devices"


@case
def temperature_zero(p: Workspace) -> Case:
    return p.sample(p.valid.model, "--temperature", 0), "temperature"


@case
def samples_longer_than_the_model(p: Workspace) -> Case:
    return p.sample(p.valid.model, "--max-tokens", 65), "64"


@case
def stop_id_outside_the_vocabulary(p: Workspace) -> Case:
    return p.sample(p.valid.model, "--stop-ids", 5000), "5000"


@case
def out_is_a_file(p: Workspace) -> Case:
    p.file("out-file", "precious")
    where = ["--model", p.valid.model, "--out", p.folder / "out-file"]
    return ["sample", *where, "--max-tokens", 8, "--samples", 2], "out-file"


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
def empty_corpus(p: Workspace) -> Case:
    return ["import", p.file("empty.jsonl", ""), "--model", p.valid.model, "--out", p.out], "empty.jsonl"


@case
def malformed_json_line(p: Workspace) -> Case:
    texts = p.file("texts.jsonl", '{"text": "fine"}\n{"text": \n')
    return ["import", texts, "--model", p.valid.model, "--out", p.out], "2"


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
def merge_of_other_tokenizers(p: Workspace) -> Case:
    model = p.model()
    shutil.copyfile(p.valid.other / "tokenizer.json", model / "tokenizer.json")
    return p.merge(model, 0.5), "another tokenizer"


@case
def merge_of_other_architectures(p: Workspace) -> Case:
    return p.merge(p.valid.other, 0.5), "vocab_size 160"


@case
def merge_with_a_missing_model(p: Workspace) -> Case:
    return p.merge(p.folder / "no-model", 0.5), "no-model"


@case
def merge_with_nan_weights(p: Workspace) -> Case:
    return p.merge(change_weights(p.model(), nan_weight), 0.5), "model.norm.weight"


@case
def merge_with_a_weight_of_nan(p: Workspace) -> Case:
    return p.merge(p.valid.model, "nan"), "--weight"


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
    rewrite(scores / "student.json", lambda result: result["fingerprints"]["files"].update(task="0" * 64))
    return p.compare(scores), "task differs"


@case
def comparison_with_other_tasks(p: Workspace) -> Case:
    scores = p.scores()
    options = ["--tasks", p.valid.texts.with_name("task.jsonl"), "--texts", p.valid.texts, "--text-limit", 1]
    scoring = ["score", "--model", p.valid.model, "--out", scores / "more.json", "--mesh", "data=1", *options]
    assert cli.main([str(word) for word in scoring]) == 0
    return p.compare(scores, student="more.json"), "base.json: texts was not scored"


@case
def comparison_without_a_margin(p: Workspace) -> Case:
    return p.compare(p.valid.scores, "--margin-task", 0), "--margin-task is 0"


@case
def comparison_with_an_unknown_primary_task(p: Workspace) -> Case:
    return p.compare(p.valid.scores, "--primary-tasks", "tusk"), "did you mean `task`"


@case
def comparison_with_unpaired_files(p: Workspace) -> Case:
    files = [p.valid.scores / "base.json"] * 2
    students = [p.valid.scores / "student.json"] * 3
    return ["compare", "--base", *files, "--student", *students, "--out", p.out], "cannot be paired"


@case
def comparison_of_one_student_twice(p: Workspace) -> Case:
    students = [p.valid.scores / "student.json"] * 2
    return [
        "compare",
        p.valid.scores / "base.json",
        "--student",
        *students,
        "--out",
        p.out,
    ], "one checkpoint is one seed"


@case
def pickled_sequences(p: Workspace) -> Case:
    return p.extract(npy(p, np.array([[1, 2], None], dtype=object))), "sequences.npy"


@case
def sequences_of_floats(p: Workspace) -> Case:
    return p.extract(npy(p, np.ones((4, 16)))), "sequences.npy"


@case
def sequences_too_short(p: Workspace) -> Case:
    return p.extract(npy(p, np.ones((4, 15), np.int32))), "16"


@case
def sequences_outside_the_vocabulary(p: Workspace) -> Case:
    return p.extract(npy(p, np.full((4, 16), 9999))), "9999"


@case
def sequences_longer_than_the_model(p: Workspace) -> Case:
    return p.extract(npy(p, np.ones((4, 100), np.int32)), "--prefix", 40, "--suffix", 40), "64"


@case
def sequences_longer_than_the_model_behind_bos(p: Workspace) -> Case:
    words = ("--prefix", 32, "--suffix", 32, "--start-token", "bos")
    return p.extract(npy(p, np.ones((4, 64), np.int32)), *words), "start token"


@case
def lengths_that_contradict_the_protocol(p: Workspace) -> Case:
    return p.extract(npy(p, np.ones((4, 64), np.int32)), "--protocol", "pythia"), "--prefix 8 contradicts"


@case
def unknown_protocol(p: Workspace) -> Case:
    return p.extract(npy(p, np.ones((4, 64), np.int32)), "--protocol", "pythias"), "pythia"


@case
def offset_beyond_all_sequences(p: Workspace) -> Case:
    return p.extract(npy(p, np.ones((4, 20), np.int32)), "--offset", 5), "--offset 5"


@case
def negative_offset(p: Workspace) -> Case:
    return p.extract(npy(p, np.ones((4, 20), np.int32)), "--offset", -1), "--offset"


@case
def invalid_sampling_policy(p: Workspace) -> Case:
    return p.extract(
        npy(p, np.ones((4, 16), np.int32)), "--sampling-policies", "topk=40"
    ), "--sampling-policies topk=40"


@case
def base_without_verify(p: Workspace) -> Case:
    return p.extract(npy(p, np.ones((4, 16), np.int32)), "--base", p.valid.model), "--verify"


@case
def baseline_with_another_tokenizer(p: Workspace) -> Case:
    return p.extract(npy(p, np.ones((4, 16), np.int32)), "--untrained-baseline", p.valid.other), "--untrained-baseline"


@case
def missing_controls(p: Workspace) -> Case:
    return p.extract(npy(p, np.ones((4, 16), np.int32)), "--control-sequences", p.folder / "gone.npy"), "gone.npy"


@case
def too_few_duplicates(p: Workspace) -> Case:
    np.save(p.folder / "copies.npy", np.ones(3, np.int32))
    return p.extract(npy(p, np.ones((4, 16), np.int32)), "--duplicate-counts", p.folder / "copies.npy"), "copies.npy"


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
    return p.extract(Path(f"{npy(p, np.ones((4, 16), np.int32))}:{p.folder / 'suffix.npy'}")), "suffix.npy"


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
    return p.leakage(npy(p, np.array([3, -1]))), "sequences.npy"


@case
def leakage_of_pickled_tokens(p: Workspace) -> Case:
    return p.leakage(npy(p, np.array([{}], dtype=object))), "sequences.npy"


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
def test_invalid_input_is_one_error_sentence(
    case: Callable[[Workspace], Case], valid: ValidInput, tmp_path: Path, capsys
):
    arguments, cause = case(Workspace(valid, tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    code = cli.main([str(word) for word in arguments])
    error = capsys.readouterr().err.strip()
    assert code == 2, error
    assert len(error.splitlines()) == 1, error
    assert "error: " in error
    assert cause in error
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path in before} == before
    assert not (tmp_path / "out").exists(), sorted((tmp_path / "out").rglob("*"))


def test_another_seed_in_the_same_corpus_folder_is_refused(valid: ValidInput, tmp_path: Path, capsys):
    command = [
        "sample",
        "--model",
        str(valid.model),
        "--out",
        str(tmp_path / "out"),
        "--samples",
        "4",
        "--max-tokens",
        "8",
    ]
    assert cli.main(command) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert cli.main([*command, "--seed", "1"]) == 2
    assert "seed" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


FULL_DISK = """
import resource, sys
sys.dont_write_bytecode = True  # truncated bytecode would break other tests
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from jax_selftrain.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_is_one_error_sentence_and_leaves_no_output(valid: ValidInput, tmp_path: Path):
    """A limit on file sizes makes the write of the weights fail."""
    out = tmp_path / "ours"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", FULL_DISK, "convert", str(valid.model), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "ours" in done.stderr.strip().splitlines()[-1]
    assert not out.exists()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
