"""Tests of `score` on several devices."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models_factory import tiny_texts

from jax_selftrain.config import ScoreConfig, yaml_io
from jax_selftrain.evals import score


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


SCORE = """
import sys, time
from pathlib import Path
import jax
from jax_selftrain.config import ScoreConfig, yaml_io
from jax_selftrain.evals import score
config = yaml_io.load(ScoreConfig, sys.argv[1])
if len(sys.argv) > 2:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
    jax.local_devices()  # processes wait for each other where their devices start
    parts = Path(config.out).with_suffix(".parts")
    while sys.argv[3] == "0" and not list(parts.glob("*/*.parquet")):
        time.sleep(0.01)  # so that process 1 has scored something that process 0 gathers
score(config)
"""


MANY = 384


@pytest.fixture
def many(tmp_path, tiny_model):
    """`many(name)` configures scoring of a task of six units into NAME.json."""
    texts = list(tiny_texts(MANY, seed=9))
    rows = [{"context": f"{i} {text[:30]}", "continuation": f" {text[30:40]}"} for i, text in enumerate(texts)]
    task = write(tmp_path / "many.jsonl", rows)

    def options(name: str) -> ScoreConfig:
        out = str(tmp_path / f"{name}.json")
        return ScoreConfig(model=str(tiny_model()), tasks=(task,), out=out, batch_tokens=16, mesh="data=1")

    return options


def start(options: ScoreConfig, *words: str, **environment: str) -> subprocess.Popen:
    file = Path(options.out).with_suffix(".yaml")
    yaml_io.save(file, options)
    command = [sys.executable, "-c", SCORE, str(file), *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})


def results(options: ScoreConfig) -> list[bytes]:
    return [Path(options.out).with_suffix(suffix).read_bytes() for suffix in (".json", ".requests.parquet")]


def timings(options: ScoreConfig) -> dict[str, Any]:
    return json.loads(Path(options.out).with_suffix(".timings.json").read_text())


def test_two_processes_divide_the_requests_and_write_the_bytes_of_one(many):
    alone, together = many("alone"), replace(many("together"), mesh="")
    score(alone)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    processes = [start(together, coordinator, str(index), JAX_NUM_CPU_DEVICES="1") for index in range(2)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert results(together) == results(alone)
    spent, units = timings(together), timings(alone)["units_by_process"]["0"]
    assert units > 4
    assert spent["units_by_process"]["1"] >= 1
    assert sum(spent["units_by_process"].values()) == units
    assert spent["computed_requests"] < MANY
    assert not Path(together.out).with_suffix(".parts").exists()
