"""Common slips: each gets one sentence that names the way out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jax_selftrain
from jax_selftrain import cli
from jax_selftrain.config import SampleConfig, ScoreConfig
from jax_selftrain.errors import InputError
from jax_selftrain.evals import score
from jax_selftrain.planning.hardware import parse_topology
from jax_selftrain.sampling import sample

ROOT = Path(jax_selftrain.__file__).parents[1]


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def refuse(*words: object) -> str:
        assert cli.main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    return refuse


def test_a_text_file_as_corpus_is_to_be_imported(refuse: Callable[..., str], tiny_model, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "A fox."}\n')
    error = refuse("train", "--model", tiny_model(), "--corpus", tmp_path / "a.jsonl", "--out", tmp_path / "run")
    assert f"make a corpus of it with `jax-selftrain import {tmp_path}/a.jsonl --model MODEL --out CORPUS`" in error


def test_a_misspelled_format_is_named(refuse: Callable[..., str], tiny_model, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "A fox."}\n')
    out = ("--model", tiny_model(), "--out", tmp_path / "s.json")
    assert "unknown format `lambda`; did you mean `lambada:`?" in refuse(
        "score", "--tasks", f"lambda:{tmp_path}/a.jsonl", *out
    )
    assert "unknown format `xyz`; the formats are arc, " in refuse("score", "--tasks", f"xyz:{tmp_path}/a.jsonl", *out)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-16", "is an accelerator type of Google Cloud; .* for instance v5e:4x4$"),
        ("v5litepod-16", "is an accelerator type of Google Cloud; .* for instance v5e:4x4$"),
        ("v4-8", "for instance v4:2x2x4$"),
        ("v5e", "needs a shape of v5e; for instance v5e:4x4, "),
        ("v5e:4", "`4` is not a shape of v5e"),
    ],
)
def test_names_of_slices_lead_to_a_topology(name: str, message: str):
    with pytest.raises(InputError, match=message):
        parse_topology(name)


def test_an_output_that_cannot_be_written_is_named(refuse: Callable[..., str], tiny_model):
    words = ("--samples", 2, "--max-tokens", 2, "--batch-size", 2)
    error = refuse("sample", "--model", tiny_model(), "--out", "/proc/x/corpus", *words)
    assert ": cannot be written (No such file or directory)" in error


def test_a_result_is_a_json_file(refuse: Callable[..., str], tiny_model, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "A fox."}\n')
    words = ("score", "--model", tiny_model(), "--texts", tmp_path / "a.jsonl")
    assert "give the name of a file that ends in .json" in refuse(*words, "--out", tmp_path / "scores")
    assert cli.main([*map(str, words), "--out", str(tmp_path / "scores.json")]) == 0


def test_options_of_a_wrong_type_from_python_are_named(tiny_model, tmp_path: Path):
    model = str(tiny_model())
    wrong: dict[str, Any] = {"tasks": "blimp:x"}
    with pytest.raises(InputError, match=r"--tasks: expected a list, each entry text, found 'blimp:x'"):
        score(ScoreConfig(model=model, out=str(tmp_path / "s.json"), **wrong))
    wrong = {"samples": "10"}
    with pytest.raises(InputError, match=r"--samples: expected a whole number, found '10'"):
        sample(SampleConfig(model=model, out=str(tmp_path / "c"), **wrong))
    wrong = {"dtype": "bf16"}
    with pytest.raises(InputError, match=r"--dtype: expected one of float32, bfloat16, found 'bf16'"):
        sample(SampleConfig(model=model, out=str(tmp_path / "c"), **wrong))


def test_help_is_a_command_and_ends_with_an_example(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["help"]) == 0
    assert "--tyro-print-completion bash" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["help", "push"])
    *_, example, page = capsys.readouterr().out.splitlines()
    assert example == "example: jax-selftrain push student org/name --private"
    assert page == "documentation: docs/models.md"


def test_the_log_has_the_level_of_the_option(tiny_model, tmp_path: Path):
    def log(*words: object) -> str:
        command = [sys.executable, "-m", "jax_selftrain", "sample", "--model", str(tiny_model()), *map(str, words)]
        sizes = ["--samples", "2", "--max-tokens", "2", "--batch-size", "2"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([*command, *sizes], env=env, capture_output=True, text=True, check=True)
        return done.stderr

    assert "SampleConfig(" in log("--out", tmp_path / "a", "--log-level", "DEBUG")
    assert log("--out", tmp_path / "b", "--log-level", "ERROR") == ""


def test_bash_completes_commands_and_options(tmp_path: Path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jax_selftrain", "--tyro-print-completion", "bash"]
    script = tmp_path / "completion"
    script.write_text(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    complete_in_bash = """
        source "$1"; shift
        function=$(complete -p jax-selftrain | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
        $function jax-selftrain "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\\n' "${COMPREPLY[@]}"
    """

    def complete(*words: str) -> set[str]:
        command = ["bash", "-c", complete_in_bash, "bash", str(script), "jax-selftrain", *words]
        return {*subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()}

    assert complete("sam") == {"sample"}
    assert {"score", "study", "subset"} <= complete("s")
    assert "--learning-rate" in complete("train", "--learn")
    assert "--train.learning-rate" in complete("run", "--train.learn")
