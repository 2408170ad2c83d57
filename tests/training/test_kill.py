"""Killed training processes: a resumed run ends with the same bits."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from training_runs import probe, run_options, weights

from jax_selftrain.config import TrainConfig, yaml_io
from jax_selftrain.errors import Preempted
from jax_selftrain.training import checkpoints, train

SERVER = """
import os, sys, traceback
sys.path.insert(0, sys.argv[2])
import orbax.checkpoint, pandas, tensorboardX
from transformers import AutoTokenizer
from training_runs import probe
from jax_selftrain.config import TrainConfig, yaml_io
from jax_selftrain.errors import SelftrainError
from jax_selftrain.training import train
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(yaml_io.load(TrainConfig, sys.argv[1]), hooks=[probe(2)])
            code = 0
        except SelftrainError as error:
            print(type(error).__name__, error, file=sys.stderr)
            code = error.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def start(config: TrainConfig, folder: Path) -> subprocess.Popen[str]:
    yaml_io.save(folder / "train.yaml", config)
    command = [sys.executable, "-m", "jax_selftrain", "train", "--config", str(folder / "train.yaml")]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until `path` has `count` lines (or the process ended by itself)."""
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < count):
        time.sleep(0.005)


@pytest.fixture(scope="module")
def long_run(small_model: Path, corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hundred steps, never interrupted."""
    folder = tmp_path_factory.mktemp("long") / "run"
    return train(run_options((small_model, corpus_folder, folder), steps=300, checkpoint_every=300))


class Launcher:
    """Launcher of processes of one run, without new imports.

    A server imports and then forks for each launch; the child starts its devices itself, as any other process.
    """

    def __init__(self, config: TrainConfig, folder: Path):
        yaml_io.save(folder / "train.yaml", config)
        self._run = Path(config.out)
        self._said = (folder / "said.txt").open("w")
        tests = str(Path(__file__).parents[1])
        command = [sys.executable, "-c", SERVER, str(folder / "train.yaml"), tests]
        pipe, environment = subprocess.PIPE, {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self._server = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._said, text=True, env=environment)

    def __enter__(self) -> "Launcher":
        return self

    def __exit__(self, *error: object) -> None:
        self._server.kill()
        self._server.wait()
        self._said.close()

    def launch_and_signal(self, number: int, ready: Callable[[], bool], delay: float) -> int:
        """Launch, send a signal `delay` seconds after `ready()`, return the exit code."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write("launch\n")
        self._server.stdin.flush()
        child = int(self._server.stdout.readline())
        while not ready() and Path(f"/proc/{child}").exists():
            time.sleep(0.002)
        time.sleep(delay)
        with suppress(ProcessLookupError):  # it ended before: the exit code tells
            os.kill(child, number)
        return int(self._server.stdout.readline())


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


KINDS = ("start",) * 2 + ("compile",) * 2 + ("steps",) * 3 + ("saving",) * 3
"""Phases of a launch in which it is killed."""


def moment(kind: str, chance: random.Random, run: Path) -> tuple[Callable[[], bool], float]:
    """Choose a random moment of the next launch: (condition, seconds after it)."""
    launches, ahead = lines_in(run / "launches.jsonl"), chance.randrange(1, 6)
    before: list[int] = []

    def under_way() -> bool:
        """Return True once the records are truncated to the restored step."""
        return lines_in(run / "launches.jsonl") > launches

    def steps_are_done() -> bool:
        if not before and under_way():
            before.append(lines_in(run / "metrics.jsonl"))
        return bool(before) and lines_in(run / "metrics.jsonl") >= before[0] + ahead

    if kind == "start":  # reading inputs, restoring
        return lambda: True, chance.uniform(0, 1)
    if kind == "compile":  # of the step, and the evaluation of step 0
        return under_way, chance.uniform(0, 0.5)
    if kind == "steps":
        return steps_are_done, chance.uniform(0, 0.1)
    return lambda: steps_are_done() and any((run / "checkpoints").glob(".*")), chance.uniform(0, 0.03)


@pytest.mark.nightly
def test_run_killed_at_ten_random_moments_ends_with_the_same_bits(
    small_model: Path, corpus_folder: Path, tmp_path: Path
):
    """SIGKILL ten times and SIGTERM once, with evaluations and permanent checkpoints."""
    seed = int(os.environ.get("JAX_SELFTRAIN_TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"JAX_SELFTRAIN_TEST_SEED={seed}")
    changes: dict[str, Any] = {
        "steps": 40, "checkpoint_every": 4, "keep_every": 14, "eval_every": 2, "eval_texts": ("probe.jsonl",),
    }  # fmt: skip
    at = (small_model, corpus_folder)
    reference = train(run_options((*at, tmp_path / "reference"), **changes), hooks=[probe(2)])
    config = run_options((*at, tmp_path / "killed"), **changes)
    run, chance = Path(config.out), random.Random(seed)
    with Launcher(config, tmp_path) as launcher:
        for kind in chance.sample((*KINDS, "SIGTERM"), len(KINDS) + 1):
            ready, delay = moment("steps" if kind == "SIGTERM" else kind, chance, run)
            code = launcher.launch_and_signal(signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL, ready, delay)
            print(f"{kind}: {lines_in(run / 'metrics.jsonl')} steps logged")
            expected = Preempted.exit_code if kind == "SIGTERM" else -signal.SIGKILL
            assert code == expected, (tmp_path / "said.txt").read_text()
    train(config, hooks=[probe(2)])
    assert weights(run) == weights(reference)
    for name in ("metrics.jsonl", "curve.jsonl"):
        assert (run / name).read_bytes() == (reference / name).read_bytes()
    assert [path.name for path in checkpoints.list_steps(run / "checkpoints")] == [
        path.name for path in checkpoints.list_steps(reference / "checkpoints")
    ]
    hidden = [path for folder in (run, run / "checkpoints") for path in folder.iterdir() if path.name.startswith(".")]
    assert not hidden, "nothing half-written is left behind"


@pytest.mark.nightly
def test_sigterm_saves_and_the_next_launch_resumes_exactly(
    long_run: Path, options: Callable[..., TrainConfig], tmp_path: Path
):
    config = options(steps=300, checkpoint_every=300)
    run = Path(config.out)
    process = start(config, tmp_path)
    wait_for_lines(run / "metrics.jsonl", 2, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == Preempted.exit_code, errors
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert f"stopped and saved after step {int(checkpoint.name)} of 300" in errors
    assert not (run / "model").exists()

    train(config)
    first, second = (json.loads(line) for line in (run / "launches.jsonl").read_text().splitlines())
    assert (first["from_step"], second["from_step"]) == (0, int(checkpoint.name))
    assert weights(run) == weights(long_run)
    assert (run / "metrics.jsonl").read_bytes() == (long_run / "metrics.jsonl").read_bytes()
