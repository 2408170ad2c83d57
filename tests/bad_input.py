"""Cases of invalid input.

A case runs a command on files; each mistake is made in a fresh copy of valid input.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from models_factory import write_tiny_hf_model
from safetensors.numpy import load_file, save_file

from jax_selftrain import cli
from jax_selftrain.io import json_files


class ValidInput:
    """Valid input, made when it is needed, shared by all cases of a module and never changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def model(self) -> Path:
        return self._write_model("model", vocab_size=128)

    @cached_property
    def other(self) -> Path:
        """A model with another tokenizer."""
        return self._write_model("other", vocab_size=160)

    @cached_property
    def texts(self) -> Path:
        lines = [json.dumps({"text": f"The cat number {i} sat on the mat."}) + "\n" for i in range(20)]
        (self._folder / "texts.jsonl").write_text("".join(lines))
        return self._folder / "texts.jsonl"

    @cached_property
    def corpus(self) -> Path:
        out = self._folder / "corpus"
        assert cli.main(["import", str(self.texts), "--model", str(self.model), "--out", str(out)]) == 0
        return out

    @cached_property
    def scores(self) -> Path:
        """A folder with `base.json` and `student.json`, two results of `score` on `task`."""
        scoring = ["score", "--tasks", str(self.task), "--mesh", "data=1", "--batch-tokens", "512"]
        student = self._write_model("student", seed=1, vocab_size=128)
        out = self._folder / "scores"
        for name, scored in (("base", self.model), ("student", student)):
            assert cli.main([*scoring, "--model", str(scored), "--out", str(out / f"{name}.json")]) == 0
        return out

    @cached_property
    def task(self) -> Path:
        file = self._folder / "task.jsonl"
        file.write_text('{"context": "The cat", "choices": [" sat on", " mat number"], "answer": 0}\n' * 4)
        return file

    def _write_model(self, name: str, **options: int) -> Path:
        return write_tiny_hf_model(self._folder / name, "llama", max_position_embeddings=64, **options)


@dataclass(frozen=True)
class Workspace:
    """Folder of one case, with commands on it."""

    valid: ValidInput
    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def result(self) -> Path:
        """The JSON file that a command would write."""
        return self.folder / "out.json"

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
        return ["score", "--model", self.valid.model, "--out", self.result, *more]

    def scores(self) -> Path:
        """A copy of two results of `score`, to be damaged."""
        return Path(shutil.copytree(self.valid.scores, self.folder / "scores"))

    def compare(self, scores: Path, *more: object, student: str = "student.json") -> list[object]:
        return ["compare", scores / "base.json", scores / student, "--out", self.result, *more]

    def extract(self, sequences: Path, *more: object) -> list[object]:
        where = ("--model", self.valid.model, "--sequences", sequences, "--out", self.result)
        lengths = () if "--prefix" in more else ("--prefix", 8, "--suffix", 8)
        return ["extract", *where, *lengths, *more]

    def extract_windows(self, *more: object) -> list[object]:
        texts = () if "--texts" in more else ("--texts", self.valid.texts)
        return ["extract-windows", "--model", self.valid.model, *texts, "--out", self.result, *more]

    def leakage(self, texts: Path, *more: object) -> list[object]:
        return ["leakage", "--corpus", self.valid.corpus, "--texts", texts, "--out", self.result, *more]


Case = tuple[list[object], str]
"""A command, and words of its error sentence."""
CaseFunction = Callable[[Workspace], Case]


def register_case(cases: list[CaseFunction], function: CaseFunction) -> CaseFunction:
    cases.append(function)
    return function


def assert_one_error_sentence(case: CaseFunction, workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a case: exit code 2, one sentence with its words, and nothing is written."""
    arguments, cause = case(workspace)
    before = {path: path.stat().st_mtime_ns for path in workspace.folder.rglob("*")}
    capsys.readouterr()
    code = cli.main([str(word) for word in arguments])
    error = capsys.readouterr().err.strip()
    assert code == 2, error
    assert len(error.splitlines()) == 1, error
    assert "error: " in error
    assert cause in error, error
    assert {path: path.stat().st_mtime_ns for path in workspace.folder.rglob("*") if path in before} == before
    assert not workspace.out.exists(), sorted(workspace.out.rglob("*"))
    assert not workspace.result.exists()


def rewrite_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json_files.read_json(path)
    change(content)
    json_files.write_json(path, content, checksum=path.name not in ("config.json", "generation_config.json"))


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


def save_sequences(workspace: Workspace, array: np.ndarray) -> Path:
    np.save(workspace.folder / "sequences.npy", array)
    return workspace.folder / "sequences.npy"
