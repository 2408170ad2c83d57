"""What a user can get wrong: exit code 2, one clear sentence that names the culprit, and nothing left behind.

Every case runs a real command on real files; each mistake is made in a fresh copy of sound input.
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
class Sound:
    """Input with nothing wrong, shared by all cases and never changed."""

    model: Path
    other: Path
    """A model with another tokenizer."""
    corpus: Path
    texts: Path
    scores: Path
    """A folder with `base.json` and `student.json`, two results of `score`."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    folder = tmp_path_factory.mktemp("sound")
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
    return Sound(model, other, folder / "corpus", texts, folder / "scores")


@dataclass(frozen=True)
class Place:
    """Where one case may do as it likes."""

    sound: Sound
    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def model(self) -> Path:
        """A copy of the model, to be damaged."""
        return Path(shutil.copytree(self.sound.model, self.folder / "model"))

    def corpus(self) -> Path:
        """A copy of the corpus, to be damaged."""
        return Path(shutil.copytree(self.sound.corpus, self.folder / "corpus"))

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def sample(self, model: Path, *more: object) -> list[object]:
        length = () if "--max-tokens" in more else ("--max-tokens", 8)
        return ["sample", "--model", model, "--out", self.out, "--samples", 4, *length, *more]

    def train(self, *more: object, model: Path | None = None, corpus: Path | None = None) -> list[object]:
        where = ("--model", model or self.sound.model, "--corpus", corpus or self.sound.corpus, "--out", self.out)
        length = () if "--seq-len" in more else ("--seq-len", 16)
        return ["train", *where, "--batch-size", 8, *length, *more]

    def merge(self, student: Path, weight: object) -> list[object]:
        return ["merge", "--base", self.sound.model, "--student", student, "--weight", weight, "--out", self.out]

    def score(self, *more: object) -> list[object]:
        return ["score", "--model", self.sound.model, "--out", self.out, *more]

    def scores(self) -> Path:
        """A copy of two results of `score`, to be damaged."""
        return Path(shutil.copytree(self.sound.scores, self.folder / "scores"))

    def compare(self, scores: Path, *more: object, student: str = "student.json") -> list[object]:
        return ["compare", scores / "base.json", scores / student, "--out", self.out, *more]

    def extract(self, sequences: Path, *more: object) -> list[object]:
        where = ("--model", self.sound.model, "--sequences", sequences, "--out", self.out)
        lengths = () if "--prefix" in more else ("--prefix", 8, "--suffix", 8)
        return ["extract", *where, *lengths, *more]

    def leakage(self, texts: Path, *more: object) -> list[object]:
        return ["leakage", "--corpus", self.sound.corpus, "--texts", texts, "--out", self.out, *more]


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


def npy(place: Place, array: np.ndarray) -> Path:
    np.save(place.folder / "sequences.npy", array)
    return place.folder / "sequences.npy"


# ------------------------------------------------------------------ cases: name → (command, words of the sentence)

Case = tuple[list[object], str]


def unknown_command(p: Place) -> Case:
    return ["smaple"], "sample"


def unknown_flag(p: Place) -> Case:
    return p.sample(p.sound.model, "--temprature", 1), "--temperature"


def unknown_config_key(p: Place) -> Case:
    return [
        "sample",
        "--config",
        p.file("c.yaml", f"model: {p.sound.model}\nout: {p.out}\nmax_token: 8\n"),
    ], "max_tokens"


def wrong_type_in_config(p: Place) -> Case:
    return ["sample", "--config", p.file("c.yaml", f"model: {p.sound.model}\nout: {p.out}\nsamples: many\n")], "samples"


def config_is_not_yaml(p: Place) -> Case:
    return ["sample", "--config", p.file("c.yaml", "model: [unclosed\n")], "c.yaml"


def missing_config_file(p: Place) -> Case:
    return ["sample", "--config", p.folder / "nowhere.yaml"], "nowhere.yaml"


def unset_variable_in_config(p: Place) -> Case:
    return ["sample", "--config", p.file("c.yaml", "model: ${NO_SUCH_VARIABLE_HERE}/m\n")], "NO_SUCH_VARIABLE_HERE"


def missing_required_option(p: Place) -> Case:
    return ["sample", "--model", p.sound.model], "--out"


def missing_model(p: Place) -> Case:
    return p.sample(p.folder / "no-model"), "no-model"


def truncated_safetensors(p: Place) -> Case:
    file = p.model() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return p.sample(file.parent), "model.safetensors"


def pickle_checkpoint(p: Place) -> Case:
    model = p.model()
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"weights": [1, 2, 3]}))
    return p.sample(model), "save_pretrained"


def unknown_architecture(p: Place) -> Case:
    model = p.model()
    rewrite(model / "config.json", lambda config: config.update(model_type="mamba"))
    return p.sample(model), "mamba"


def unhandled_config_key(p: Place) -> Case:
    model = p.model()
    rewrite(model / "config.json", lambda config: config.update(mysterious_scaling=2.0))
    return p.sample(model), "mysterious_scaling"


def dynamic_rope(p: Place) -> Case:
    model = p.model()
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    rewrite(model / "config.json", lambda config: config.update(rope_parameters=rope))
    return p.sample(model), "dynamic"


def damaged_model_config(p: Place) -> Case:
    model = p.model()
    (model / "config.json").write_text('{"model_type": "llama", ')
    return p.sample(model), "config.json"


def nan_weights(p: Place) -> Case:
    return p.sample(change_weights(p.model(), nan_weight)), "model.norm.weight"


def missing_tensor(p: Place) -> Case:
    return p.sample(change_weights(p.model(), lambda w: w.pop("model.norm.weight"))), "model.norm.weight"


def unexpected_tensor(p: Place) -> Case:
    return p.sample(change_weights(p.model(), lambda w: w.update(adapter=np.ones(3, np.float32)))), "adapter"


def misshapen_tensor(p: Place) -> Case:
    weights = {"model.norm.weight": np.ones(7, np.float32)}
    return p.sample(change_weights(p.model(), lambda w: w.update(weights))), "model.norm.weight"


def model_without_tokenizer(p: Place) -> Case:
    model = p.model()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model / file).unlink()
    return ["import", p.sound.texts, "--model", model, "--out", p.out], "tokenizer"


def flipped_byte_in_our_model_folder(p: Place) -> Case:
    ours = p.folder / "ours"
    assert cli.main(["convert", str(p.sound.model), str(ours)]) == 0
    largest = max((f for f in (ours / "params").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    flip_byte(largest)
    return p.sample(ours), largest.name


def more_devices_than_there_are(p: Place) -> Case:
    return p.sample(p.sound.model, "--mesh", "data=512"), "512"


def mesh_that_does_not_divide(p: Place) -> Case:
    return p.sample(p.sound.model, "--mesh", "model=5"), "model can be"


def temperature_zero(p: Place) -> Case:
    return p.sample(p.sound.model, "--temperature", 0), "temperature"


def samples_longer_than_the_model(p: Place) -> Case:
    return p.sample(p.sound.model, "--max-tokens", 65), "64"


def stop_id_outside_the_vocabulary(p: Place) -> Case:
    return p.sample(p.sound.model, "--stop-ids", 5000), "5000"


def out_is_a_file(p: Place) -> Case:
    p.file("out-file", "precious")
    where = ["--model", p.sound.model, "--out", p.folder / "out-file"]
    return ["sample", *where, "--max-tokens", 8, "--samples", 2], "out-file"


def corrupted_shard(p: Place) -> Case:
    corpus = p.corpus()
    flip_byte(corpus / "shard-000000.parquet")
    return p.train(corpus=corpus), "shard-000000.parquet"


def missing_shard(p: Place) -> Case:
    corpus = p.corpus()
    (corpus / "shard-000000.parquet").unlink()
    return p.train(corpus=corpus), "shard-000000.parquet"


def corpus_without_manifest(p: Place) -> Case:
    corpus = p.corpus()
    (corpus / "corpus.json").unlink()
    return p.train(corpus=corpus), "corpus.json"


def wrong_tokenizer(p: Place) -> Case:
    return p.train(model=p.sound.other), "tokenizer"


def empty_corpus(p: Place) -> Case:
    return ["import", p.file("empty.jsonl", ""), "--model", p.sound.model, "--out", p.out], "empty.jsonl"


def malformed_json_line(p: Place) -> Case:
    texts = p.file("texts.jsonl", '{"text": "fine"}\n{"text": \n')
    return ["import", texts, "--model", p.sound.model, "--out", p.out], "2"


def rows_longer_than_the_model(p: Place) -> Case:
    return p.train("--seq-len", 65), "64"


def batch_that_does_not_divide(p: Place) -> Case:
    return p.train("--grad-accum", 3, "--mesh", "data=1"), "multiple"


def negative_learning_rate(p: Place) -> Case:
    return p.train("--learning-rate", -1), "learning-rate"


def mix_without_a_share(p: Place) -> Case:
    return p.train("--mixture", p.sound.corpus), "FOLDER=SHARE"


def mix_with_shares_of_everything(p: Place) -> Case:
    return p.train("--mixture", "a=0.5", "b=0.5"), "sum to 1"


def missing_mixed_corpus(p: Place) -> Case:
    return p.train("--mixture", f"{p.folder / 'no-corpus'}=0.1"), "no-corpus"


def corrupted_shard_of_a_mixed_corpus(p: Place) -> Case:
    corpus = p.corpus()
    flip_byte(corpus / "shard-000000.parquet")
    return p.train("--mixture", f"{corpus}=0.1"), f"{corpus}/shard-000000.parquet"


def corpus_mixed_with_itself(p: Place) -> Case:
    return p.train("--mixture", f"{p.sound.corpus}/=0.1"), "the same corpus"


def no_epochs_at_all(p: Place) -> Case:
    return p.train("--max-epochs", 0), "max-epochs"


def merge_of_other_tokenizers(p: Place) -> Case:
    model = p.model()
    shutil.copyfile(p.sound.other / "tokenizer.json", model / "tokenizer.json")
    return p.merge(model, 0.5), "another tokenizer"


def merge_of_other_architectures(p: Place) -> Case:
    return p.merge(p.sound.other, 0.5), "vocab_size 160"


def merge_of_nothing(p: Place) -> Case:
    return p.merge(p.folder / "no-model", 0.5), "no-model"


def merge_with_nan_weights(p: Place) -> Case:
    return p.merge(change_weights(p.model(), nan_weight), 0.5), "model.norm.weight"


def merge_by_no_number(p: Place) -> Case:
    return p.merge(p.sound.model, "nan"), "--weight"


def evaluation_without_an_interval(p: Place) -> Case:
    return p.train("--eval-texts", p.sound.texts), "--eval-every"


def nothing_to_evaluate(p: Place) -> Case:
    return p.train("--eval-every", 2), "nothing to evaluate"


def missing_file_to_evaluate(p: Place) -> Case:
    return p.train("--eval-every", 2, "--eval-texts", p.folder / "gone.jsonl"), "gone.jsonl"


def malformed_task_to_evaluate(p: Place) -> Case:
    task = p.file("task.jsonl", '{"context": "a", "choices": ["b", "c"], "answer": 2}\n')
    return p.train("--eval-every", 2, "--eval-tasks", task), "task.jsonl:1"


def stopping_on_what_is_not_measured(p: Place) -> Case:
    words = ("--eval-every", 2, "--eval-texts", p.sound.texts, "--stop-metric", "heldout/nll")
    return p.train(*words), "this run can stop on texts/nll"


def adapter_on_no_matrix(p: Place) -> Case:
    return p.train("--lora-rank", 2, "--lora-targets", "qkv"), "--lora-targets qkv"


def rounding_of_what_is_not_rounded(p: Place) -> Case:
    return p.train("--stochastic-rounding"), "--param-dtype bfloat16"


def penalty_without_a_base(p: Place) -> Case:
    return p.train("--kl-weight", 0.5, "--init", "scratch"), "--kl-weight"


def missing_task_file(p: Place) -> Case:
    return p.score("--tasks", p.folder / "no-task.jsonl"), "no-task.jsonl"


def malformed_task_line(p: Place) -> Case:
    return p.score("--tasks", p.file("t.jsonl", '{"context": "a", "choices": [" b", " c"]}\n')), "answer"


def answer_that_is_no_choice(p: Place) -> Case:
    line = '{"context": "a", "choices": [" b", " c"], "answer": 7}\n'
    return p.score("--tasks", p.file("t.jsonl", line)), "7"


def nothing_to_score(p: Place) -> Case:
    return p.score(), "tasks"


def comparison_with_a_missing_result(p: Place) -> Case:
    return p.compare(p.sound.scores, student="gone.json"), "gone.json"


def comparison_with_something_else(p: Place) -> Case:
    return p.compare(p.sound.scores, student="student.timings.json"), "is not a result of `jax-selftrain score`"


def comparison_without_documents(p: Place) -> Case:
    scores = p.scores()
    (scores / "student.items.parquet").unlink()
    return p.compare(scores), "student.items.parquet"


def comparison_of_cut_documents(p: Place) -> Case:
    scores = p.scores()
    file = scores / "student.items.parquet"
    file.write_bytes(file.read_bytes()[:-40])
    return p.compare(scores), "student.items.parquet"


def comparison_of_documents_of_another_result(p: Place) -> Case:
    scores = p.scores()
    shutil.copy(scores / "base.items.parquet", scores / "student.items.parquet")
    return p.compare(scores), "student.items.parquet: does not match student.json"


def comparison_over_other_files(p: Place) -> Case:
    scores = p.scores()
    rewrite(scores / "student.json", lambda result: result["fingerprints"]["files"].update(task="0" * 64))
    return p.compare(scores), "task was another file"


def comparison_over_other_tasks(p: Place) -> Case:
    scores = p.scores()
    options = ["--tasks", p.sound.texts.with_name("task.jsonl"), "--texts", p.sound.texts, "--text-limit", 1]
    scoring = ["score", "--model", p.sound.model, "--out", scores / "more.json", "--mesh", "data=1", *options]
    assert cli.main([str(word) for word in scoring]) == 0
    return p.compare(scores, student="more.json"), "base.json: texts was not scored"


def comparison_without_a_margin(p: Place) -> Case:
    return p.compare(p.sound.scores, "--margin-task", 0), "--margin-task is 0"


def comparison_by_an_unknown_task(p: Place) -> Case:
    return p.compare(p.sound.scores, "--primary-tasks", "tusk"), "did you mean `task`"


def comparison_that_cannot_be_paired(p: Place) -> Case:
    files = [p.sound.scores / "base.json"] * 2
    students = [p.sound.scores / "student.json"] * 3
    return ["compare", "--base", *files, "--student", *students, "--out", p.out], "cannot be paired"


def comparison_of_one_student_twice(p: Place) -> Case:
    students = [p.sound.scores / "student.json"] * 2
    return [
        "compare",
        p.sound.scores / "base.json",
        "--student",
        *students,
        "--out",
        p.out,
    ], "one checkpoint is one seed"


def pickled_sequences(p: Place) -> Case:
    return p.extract(npy(p, np.array([[1, 2], None], dtype=object))), "sequences.npy"


def sequences_of_floats(p: Place) -> Case:
    return p.extract(npy(p, np.ones((4, 16)))), "sequences.npy"


def sequences_too_short(p: Place) -> Case:
    return p.extract(npy(p, np.ones((4, 15), np.int32))), "16"


def sequences_outside_the_vocabulary(p: Place) -> Case:
    return p.extract(npy(p, np.full((4, 16), 9999))), "9999"


def sequences_longer_than_the_model(p: Place) -> Case:
    return p.extract(npy(p, np.ones((4, 100), np.int32)), "--prefix", 40, "--suffix", 40), "64"


def sequences_longer_than_the_model_behind_bos(p: Place) -> Case:
    words = ("--prefix", 32, "--suffix", 32, "--start-token", "bos")
    return p.extract(npy(p, np.ones((4, 64), np.int32)), *words), "start token"


def lengths_that_contradict_the_protocol(p: Place) -> Case:
    return p.extract(npy(p, np.ones((4, 64), np.int32)), "--protocol", "pythia"), "--prefix 8 contradicts"


def unknown_protocol(p: Place) -> Case:
    return p.extract(npy(p, np.ones((4, 64), np.int32)), "--protocol", "pythias"), "pythia"


def offset_beyond_all_sequences(p: Place) -> Case:
    return p.extract(npy(p, np.ones((4, 20), np.int32)), "--offset", 5), "--offset 5"


def negative_offset(p: Place) -> Case:
    return p.extract(npy(p, np.ones((4, 20), np.int32)), "--offset", -1), "--offset"


def policy_that_is_none(p: Place) -> Case:
    return p.extract(
        npy(p, np.ones((4, 16), np.int32)), "--sampling-policies", "topk=40"
    ), "--sampling-policies topk=40"


def base_that_verifies_nothing(p: Place) -> Case:
    return p.extract(npy(p, np.ones((4, 16), np.int32)), "--base", p.sound.model), "--verify"


def baseline_with_another_tokenizer(p: Place) -> Case:
    return p.extract(npy(p, np.ones((4, 16), np.int32)), "--untrained-baseline", p.sound.other), "--untrained-baseline"


def missing_controls(p: Place) -> Case:
    return p.extract(npy(p, np.ones((4, 16), np.int32)), "--control-sequences", p.folder / "gone.npy"), "gone.npy"


def too_few_duplicates(p: Place) -> Case:
    np.save(p.folder / "copies.npy", np.ones(3, np.int32))
    return p.extract(npy(p, np.ones((4, 16), np.int32)), "--duplicate-counts", p.folder / "copies.npy"), "copies.npy"


def sequences_too_short_in_parquet(p: Place) -> Case:
    return p.extract(p.sound.corpus / "shard-000000.parquet", "--prefix", 60, "--suffix", 4), "fewer than prefix"


def parquet_that_is_none(p: Place) -> Case:
    return p.extract(p.file("rows.parquet", b"PAR1 and nothing more")), "rows.parquet"


def folder_without_sequences(p: Place) -> Case:
    (p.folder / "nothing").mkdir()
    return p.extract(p.folder / "nothing"), "nothing"


def half_a_pair_of_sequences(p: Place) -> Case:
    return p.extract(Path(f"{npy(p, np.ones((4, 16), np.int32))}:{p.folder / 'suffix.npy'}")), "suffix.npy"


def leakage_of_text_without_a_tokenizer(p: Place) -> Case:
    return p.leakage(p.sound.texts), "--tokenizer"


def leakage_by_another_tokenizer(p: Place) -> Case:
    return p.leakage(p.sound.texts, "--tokenizer", p.sound.other), "--tokenizer"


def leakage_of_a_missing_text(p: Place) -> Case:
    return p.leakage(p.folder / "gone.jsonl"), "gone.jsonl"


def leakage_of_no_length(p: Place) -> Case:
    return p.leakage(p.sound.corpus, "--length", 0), "--length"


def leakage_of_text_under_another_name(p: Place) -> Case:
    texts = p.file("texts.jsonl", '{"text": "fine"}\n{"story": "not"}\n')
    return p.leakage(texts, "--tokenizer", p.sound.model), "texts.jsonl:2"


def leakage_of_what_is_no_token(p: Place) -> Case:
    return p.leakage(npy(p, np.array([3, -1]))), "sequences.npy"


def leakage_of_pickled_tokens(p: Place) -> Case:
    return p.leakage(npy(p, np.array([{}], dtype=object))), "sequences.npy"


def round_that_sets_what_is_its_own(p: Place) -> Case:
    yaml = f"model: {p.sound.model}\nsample: {{model: elsewhere}}\nscore: {{texts: [{p.sound.texts}]}}\n"
    return ["run", "--config", p.file("run.yaml", yaml), "--out", p.out], "sample.model"


def round_with_a_missing_task(p: Place) -> Case:
    yaml = (
        f"model: {p.sound.model}\nscore: {{tasks: [gone.jsonl]}}\nsample: {{max_tokens: 8}}\ntrain: {{seq_len: 16}}\n"
    )
    return ["run", "--config", p.file("run.yaml", yaml), "--out", p.out], "gone.jsonl"


def report_of_nothing(p: Place) -> Case:
    (p.folder / "empty").mkdir()
    return ["report", p.folder / "empty"], "empty"


CASES = (
    unknown_command, unknown_flag, unknown_config_key, wrong_type_in_config, config_is_not_yaml, missing_config_file,
    unset_variable_in_config, missing_required_option, missing_model, truncated_safetensors, pickle_checkpoint,
    unknown_architecture, unhandled_config_key, dynamic_rope, damaged_model_config, nan_weights, missing_tensor,
    unexpected_tensor, misshapen_tensor, model_without_tokenizer, flipped_byte_in_our_model_folder,
    more_devices_than_there_are, mesh_that_does_not_divide, temperature_zero, samples_longer_than_the_model,
    stop_id_outside_the_vocabulary, out_is_a_file, corrupted_shard, missing_shard, corpus_without_manifest,
    wrong_tokenizer, empty_corpus, malformed_json_line, rows_longer_than_the_model, batch_that_does_not_divide,
    negative_learning_rate, mix_without_a_share, mix_with_shares_of_everything, missing_mixed_corpus,
    corrupted_shard_of_a_mixed_corpus, corpus_mixed_with_itself, no_epochs_at_all, merge_of_other_tokenizers,
    merge_of_other_architectures, merge_of_nothing, merge_with_nan_weights, merge_by_no_number,
    evaluation_without_an_interval, nothing_to_evaluate, missing_file_to_evaluate,
    malformed_task_to_evaluate, stopping_on_what_is_not_measured,
    adapter_on_no_matrix, rounding_of_what_is_not_rounded, penalty_without_a_base,
    missing_task_file, malformed_task_line, answer_that_is_no_choice, nothing_to_score,
    comparison_with_a_missing_result, comparison_with_something_else, comparison_without_documents,
    comparison_of_cut_documents, comparison_of_documents_of_another_result, comparison_over_other_files,
    comparison_over_other_tasks, comparison_without_a_margin, comparison_by_an_unknown_task,
    comparison_that_cannot_be_paired, comparison_of_one_student_twice,
    pickled_sequences, sequences_of_floats, sequences_too_short, sequences_outside_the_vocabulary,
    sequences_longer_than_the_model, sequences_longer_than_the_model_behind_bos, lengths_that_contradict_the_protocol,
    unknown_protocol, offset_beyond_all_sequences, negative_offset, policy_that_is_none, base_that_verifies_nothing,
    baseline_with_another_tokenizer, missing_controls, too_few_duplicates, sequences_too_short_in_parquet,
    parquet_that_is_none, folder_without_sequences, half_a_pair_of_sequences, leakage_of_text_without_a_tokenizer,
    leakage_by_another_tokenizer, leakage_of_a_missing_text, leakage_of_no_length, leakage_of_text_under_another_name,
    leakage_of_what_is_no_token, leakage_of_pickled_tokens,
    round_that_sets_what_is_its_own, round_with_a_missing_task, report_of_nothing,
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_mistake_gets_one_clear_sentence(case: Callable[[Place], Case], sound: Sound, tmp_path: Path, capsys):
    arguments, culprit = case(Place(sound, tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    code = cli.main([str(word) for word in arguments])
    said = capsys.readouterr().err.strip()
    assert code == 2, said
    assert len(said.splitlines()) == 1, said
    assert "error: " in said
    assert culprit in said
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path in before} == before
    assert not (tmp_path / "out").exists(), sorted((tmp_path / "out").rglob("*"))


def test_another_seed_in_the_same_corpus_folder_is_refused(sound: Sound, tmp_path: Path, capsys):
    command = [
        "sample",
        "--model",
        str(sound.model),
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
sys.dont_write_bytecode = True  # Python would leave modules cut off at the limit behind, to be read by all other tests
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from jax_selftrain.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_is_said_in_one_sentence_and_leaves_nothing_half_written(sound: Sound, tmp_path: Path):
    """A limit on the size of files stands in for the disk: the write of the weights fails in the middle."""
    out = tmp_path / "ours"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", FULL_DISK, "convert", str(sound.model), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "ours" in done.stderr.strip().splitlines()[-1]
    assert not out.exists()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
