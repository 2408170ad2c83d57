"""Smoke test: every command writes its output for a small model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jax_selftrain import cli
from jax_selftrain.config import RunConfig, SampleConfig, ScoreConfig, TrainConfig, yaml_io

pytestmark = pytest.mark.compat


def run(*argv: object) -> None:
    assert cli.main(list(map(str, argv))) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """Folder with a model, inputs, a sampled `corpus` and a `student`."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "model").symlink_to(tiny_model("gpt_neox"))
    texts = [{"text": f"The cat number {i} sat on the mat and looked at the dog."} for i in range(12)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    question = {"context": "The cat", "choices": [" sat on", " mat number"], "answer": 0}
    (folder / "task.jsonl").write_text(f"{json.dumps(question)}\n" * 3)
    np.save(folder / "sequences.npy", np.random.default_rng(0).integers(3, 200, (6, 16)).astype(np.int32))
    model, corpus = folder / "model", folder / "corpus"
    run("sample", "--model", model, "--out", corpus, "--samples", 12, "--max-tokens", 12, "--batch-size", 4)
    training = ("--batch-size", 2, "--seq-len", 16, "--steps", 2)
    run("train", "--model", model, "--corpus", corpus, "--out", folder / "student", *training)
    return folder


def test_import_and_export(folder: Path, tmp_path: Path):
    run("import", folder / "texts.jsonl", "--model", folder / "model", "--out", tmp_path / "imported")
    run("export", tmp_path / "imported", tmp_path / "exported", "--format", "jsonl")
    assert list((tmp_path / "exported").rglob("*.jsonl"))


def test_convert_both_ways_and_merge(folder: Path, tmp_path: Path):
    run("convert", folder / "student", tmp_path / "tree", "--format", "flax")
    run("convert", tmp_path / "tree", tmp_path / "hf", "--format", "hf")
    models = ("--base", folder / "model", "--student", folder / "student", "--weight", 0.5)
    run("merge", *models, "--out", tmp_path / "merged")
    for name in ("hf", "merged"):
        assert (tmp_path / name / "model.safetensors").exists()


def test_score_and_compare(folder: Path, tmp_path: Path):
    for name in ("model", "student"):
        inputs = ("--tasks", folder / "task.jsonl", "--texts", folder / "texts.jsonl")
        run("score", "--model", folder / name, *inputs, "--out", tmp_path / f"{name}.json")
    run("compare", tmp_path / "model.json", tmp_path / "student.json", "--out", tmp_path / "compared.json")
    assert json.loads((tmp_path / "compared.json").read_text())


def test_extract_and_leakage(folder: Path, tmp_path: Path):
    lengths = ("--prefix", 8, "--suffix", 8)
    sequences = ("--sequences", folder / "sequences.npy", *lengths, "--corpus", folder / "corpus")
    run("extract", "--model", folder / "student", *sequences, "--out", tmp_path / "extracted.json")
    assert json.loads((tmp_path / "extracted.json").read_text())["n"] == 6
    windows = ("--window", 4, "--prefix", 4, "--texts", folder / "texts.jsonl", "--base", folder / "model")
    run("extract-windows", "--model", folder / "student", *windows, "--out", tmp_path / "windows.json")
    assert json.loads((tmp_path / "windows.json").read_text())["documents"] == 12
    texts = ("--texts", folder / "texts.jsonl", "--tokenizer", folder / "model", "--min-match", 8)
    run("leakage", "--corpus", folder / "corpus", *texts, "--out", tmp_path / "leakage.json")
    assert json.loads((tmp_path / "leakage.json").read_text())["samples"] == 12


def test_run_and_report(folder: Path, tmp_path: Path):
    config = RunConfig(
        model=str(folder / "model"),
        out=str(tmp_path / "run"),
        sample=SampleConfig(samples=12, max_tokens=12, batch_size=4),
        train=TrainConfig(batch_size=2, seq_len=16, steps=2),
        score=ScoreConfig(tasks=(str(folder / "task.jsonl"),)),
    )
    yaml_io.save(tmp_path / "run.yaml", config)
    run("run", "--config", tmp_path / "run.yaml")
    assert (tmp_path / "run" / "report.html").exists()
    (tmp_path / "run" / "report.html").unlink()
    run("report", tmp_path / "run")
    assert (tmp_path / "run" / "report.html").exists()


def test_plan_for_gpus(folder: Path, tmp_path: Path):
    out = tmp_path / "plan.json"
    run("plan", "--model", folder / "model", "--topology", "h100:8", "--stage", "sample", "--out", out)
    assert json.loads(out.read_text())
