"""Runs by several processes equal runs by one and survive losses."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from process_group import kill_when, start_processes, wait_for_all

from jax_selftrain.config import (
    ArmConfig,
    ExtractConfig,
    ModelConfig,
    RunConfig,
    ScoreConfig,
    StudyConfig,
    SubsetConfig,
    yaml_io,
)
from jax_selftrain.io import json_files
from jax_selftrain.study.design import make_design

Words = Callable[[Path], list[object]]


@pytest.fixture(scope="module")
def config(options: Callable[..., RunConfig]) -> RunConfig:
    """The small run, with ten shards."""
    config = options(Path("out"), mesh="")
    return replace(
        config,
        sample=replace(config.sample, batch_size=2, samples_per_shard=4),
        train=replace(config.train, batch_size=8, steps=6),
        score=replace(config.score, tasks=config.score.tasks[:1], texts=(), batch_tokens=128),
        extract=replace(config.extract, batch_tokens=64, greedy_decode=False),
    )


@pytest.fixture(scope="module")
def words(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Words:
    """`words(out)`: the command line of the run."""
    file = tmp_path_factory.mktemp("together") / "run.yaml"
    yaml_io.save(file, config)
    return lambda out: ["run", "--config", file, "--out", out]


@pytest.fixture(scope="module")
def sample_words(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Words:
    """`sample_words(out)`: the command line that samples the corpus of the run."""
    file = tmp_path_factory.mktemp("together") / "sample.yaml"
    yaml_io.save(file, replace(config.sample, model=config.model))
    return lambda out: ["sample", "--config", file, "--out", out]


def run_alone(words: Words, out: Path) -> Path:
    """Run a command in one process."""
    codes, output = wait_for_all(start_processes(words(out), 1))
    assert codes == [0], output
    return out


@pytest.fixture(scope="module")
def corpus(sample_words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of one process."""
    return run_alone(sample_words, tmp_path_factory.mktemp("corpus") / "out")


@pytest.fixture(scope="module")
def alone(words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    return run_alone(words, tmp_path_factory.mktemp("alone") / "out")


def stage_folders(out: Path, command: str) -> list[Path]:
    """Return the folders of a command's stages, sorted by name."""
    return sorted(path for path in (out / "stages").glob(f"{command}-*") if path.is_dir())


def read_corpus(out: Path) -> dict[str, bytes]:
    (folder,) = stage_folders(out, "sample") if (out / "stages").exists() else [out]
    files = [folder / "corpus.json", *sorted(folder.glob("shard-*.parquet"))]
    return {path.name: path.read_bytes() for path in files}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_losses(folder: Path) -> list[float]:
    (run,) = stage_folders(folder, "train")
    return [line["loss"] for line in read_lines(run / "metrics.jsonl")]


@pytest.mark.nightly
@pytest.mark.parametrize("processes", [2, 4])
def test_a_run_of_several_processes_gives_the_results_of_one(
    words: Words, alone: Path, tmp_path: Path, processes: int
) -> None:
    out = tmp_path / "out"
    codes, output = wait_for_all(start_processes(words(out), processes))
    assert codes == [0] * processes, output
    assert read_corpus(out) == read_corpus(alone)
    # Gloo sums in another order than one process does.
    np.testing.assert_allclose(read_losses(out), read_losses(alone), rtol=1e-5)
    design = make_design(yaml_io.load(StudyConfig, alone / "config.yaml"))
    for stage, names in (
        (design.score_base["llama"], ("score.json", "score.requests.parquet")),
        (design.extract_base["llama"], ("extract.json", "extract.sequences.parquet")),
    ):
        for name in names:
            assert (out / "stages" / stage.name / name).read_bytes() == (design.folder(stage) / name).read_bytes()
    (run,) = stage_folders(out, "train")
    assert json_files.read_json(run / "launches.jsonl")["processes"] == processes
    assert len(list(out.rglob("report.html"))) == 1
    assert not list(out.rglob(".*"))
    assert not list(out.rglob("*.parts"))


SHORT_TIMEOUT = ("--heartbeat-timeout", 10)
"""Seconds after which a silent process counts as lost."""


def all_hold_a_lease(group: Sequence[subprocess.Popen[str]], *folders: Path) -> bool:
    """Return True if every process holds a lease below the folders.

    Each is then in process-local work. A process that is still starting ends with the process that is lost.
    """
    held = set()
    for path in (path for folder in folders for path in folder.rglob("*.lease")):
        with suppress(FileNotFoundError, ValueError):  # released, or being written
            held.add(json.loads(path.read_text())["pid"])
    return {process.pid for process in group} <= held


def sentence(output: str) -> str:
    """Return the one line of our own; JAX may print more."""
    (line,) = (line for line in output.splitlines() if line.startswith("jax-selftrain"))
    return line


@pytest.mark.parametrize(("processes", "victim"), [pytest.param(3, 1, marks=pytest.mark.nightly), (2, 0)])
def test_a_kill_in_training_ends_the_other_processes_with_one_sentence(
    config: RunConfig, corpus: Path, tmp_path: Path, processes: int, victim: int
) -> None:
    options = replace(
        config.train,
        model=config.model,
        corpus=str(corpus),
        steps=5000,
        batch_size=12,
        preset="replicated",
    )
    yaml_io.save(tmp_path / "train.yaml", options)
    run = tmp_path / "run"
    group = start_processes(["train", "--config", tmp_path / "train.yaml", "--out", run], processes, *SHORT_TIMEOUT)
    when = kill_when(group, victim, lambda: len(read_lines(run / "metrics.jsonl")) > 2)
    codes, output = wait_for_all(group, 60)
    assert time.monotonic() - when < 60
    assert codes == [-signal.SIGKILL if index == victim else 75 for index in range(processes)], output
    for index in set(range(processes)) - {victim}:
        assert re.match(
            f"jax-selftrain train: error: process {victim} of {processes}.* was lost; .*run the same command again",
            sentence(output[index]),
        )


def test_the_other_processes_complete_the_corpus_after_a_kill(
    sample_words: Words, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "corpus"
    group = start_processes(sample_words(out), 2, *SHORT_TIMEOUT)
    kill_when(group, 0, lambda: all_hold_a_lease(group, out))
    codes, output = wait_for_all(group)
    assert codes == [-signal.SIGKILL, 0], output
    assert read_corpus(out) == read_corpus(corpus)
    assert not list(out.rglob("*.lease"))


def write_many_rows(path: str, to: Path, rows: int) -> str:
    """Write many rows like those of another file: seconds of work."""
    with to.open("w", encoding="utf-8") as file:
        for number, row in enumerate(islice(cycle(read_lines(Path(path))), rows)):
            if "context" in row:  # equal requests would be scored once
                row = row | {"context": f"{number} " + 4 * row["context"]}
            file.write(json.dumps(row) + "\n")
    return str(to)


@pytest.mark.nightly
@pytest.mark.parametrize("stage", ["score", "extract"])
def test_the_other_processes_complete_scoring_after_a_kill(
    config: RunConfig, corpus: Path, tmp_path: Path, stage: str
) -> None:
    options: ScoreConfig | ExtractConfig = replace(getattr(config, stage), model=config.model)
    if isinstance(options, ExtractConfig):
        sequences = write_many_rows(options.sequences, tmp_path / "sequences.jsonl", 800)
        options = replace(options, corpus=str(corpus), sequences=sequences)
    else:
        options = replace(options, tasks=(write_many_rows(options.tasks[0], tmp_path / "animals.jsonl", 1200),))
    yaml_io.save(tmp_path / "options.yaml", options)
    words = [stage, "--config", tmp_path / "options.yaml", "--out"]
    out = tmp_path / "base.json"
    group = start_processes([*words, out], 2, *SHORT_TIMEOUT)
    kill_when(group, 0, lambda: all_hold_a_lease(group, tmp_path))
    codes, output = wait_for_all(group)
    assert codes == [-signal.SIGKILL, 0], output
    assert not list(tmp_path.rglob("*.parts"))
    codes, output = wait_for_all(start_processes([*words, tmp_path / "undisturbed.json"], 1))
    assert codes == [0], output
    assert out.read_bytes() == (tmp_path / "undisturbed.json").read_bytes()
    if stage == "score":
        assert (
            json_files.read_json(tmp_path / "undisturbed.timings.json")["units_by_process"]["0"] > 4
        )  # work for two processes


@pytest.mark.nightly
def test_a_run_that_loses_a_process_in_sampling_completes_the_corpus_and_resumes(
    alone: Path, words: Words, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    group = start_processes(words(out), 2, *SHORT_TIMEOUT)
    kill_when(group, 1, lambda: all_hold_a_lease(group, *stage_folders(out, "sample")))
    codes, output = wait_for_all(group)
    assert codes == [75, -signal.SIGKILL], output
    assert re.match(
        "jax-selftrain run: error: process 1 of 2 was lost; .*run the same command again", sentence(output[0])
    )
    assert read_corpus(out) == read_corpus(alone)
    assert not (out / "model").exists()
    codes, output = wait_for_all(start_processes(words(out), 2))
    assert codes == [0, 0], output
    assert read_corpus(out) == read_corpus(alone)
    np.testing.assert_allclose(read_losses(out), read_losses(alone), rtol=1e-5)
    assert (out / "report.html").exists()


@pytest.mark.nightly
def test_process_0_makes_the_texts_of_a_study_of_several_processes(config: RunConfig, tmp_path: Path) -> None:
    study = StudyConfig(
        models=(ModelConfig("llama", config.model),),
        arms=(ArmConfig("away", "extrapolate", weight=-0.5),),
        subset=SubsetConfig(tokens=100),
        sample=replace(config.sample, seed=0),
        train=replace(config.train, seed=0, steps=2),
        score=config.score,
    )
    yaml_io.save(tmp_path / "study.yaml", study)
    words = ["study", "--config", tmp_path / "study.yaml", "--out"]
    folders = {processes: tmp_path / str(processes) for processes in (1, 2)}
    for processes, out in folders.items():
        codes, output = wait_for_all(start_processes([*words, out], processes))
        assert codes == [0] * processes, output
    for command in ("sample", "subset", "retokenize"):
        one, two = ([path.name for path in stage_folders(out, command)] for out in folders.values())
        assert one == two
        (name,) = one
        one, two = (
            [path.read_bytes() for path in sorted((out / "stages" / name).glob("shard-*.parquet"))]
            for out in folders.values()
        )
        assert one == two
    np.testing.assert_allclose(*map(read_losses, folders.values()), rtol=1e-5)
    cells = json.loads((folders[2] / "results.json").read_text())["cells"]
    assert [cell["treatment"] for cell in cells] == ["source llama", "away"]
    assert not list(tmp_path.rglob("*.lease"))

    noisy = replace(study, arms=(ArmConfig("noise", "noise"),))
    yaml_io.save(tmp_path / "noise.yaml", noisy)
    words = ["study", "--config", tmp_path / "noise.yaml", "--out", tmp_path / "noise"]
    codes, output = wait_for_all(start_processes(words, 2))
    assert codes == [2, 2], output
    assert "in a program of 2 processes; start the command on every host with --num-processes 1" in output[0]
