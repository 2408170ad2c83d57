"""Killed training processes: a resumed run ends with the same bits."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launcher import CommandProcess, launch, launch_code
from model_params import param_bytes
from training_runs import count_lines, probe, run_options

from jax_selftrain.config import TrainConfig, yaml_io
from jax_selftrain.errors import Preempted
from jax_selftrain.io.jsonl import read_log
from jax_selftrain.training import checkpoints, train

TRAIN_WITH_PROBE = """
import sys
from training_runs import probe
from jax_selftrain.config import TrainConfig, yaml_io
from jax_selftrain.errors import Preempted
from jax_selftrain.training import train
from jax_selftrain.io.jsonl import read_log
from jax_selftrain.io.jsonl import read_log
try:
    train(yaml_io.load(TrainConfig, sys.argv[1]), hooks=[probe(2)])
except Preempted as error:
    sys.exit(error.exit_code)
"""


def signal_at(process: CommandProcess, number: int, condition: Callable[[], bool], delay: float) -> tuple[int, str]:
    """Send a signal `delay` seconds after the condition holds; return exit code and standard error."""
    process.wait_until(condition)
    time.sleep(delay)
    process.send_signal(number)
    _, errors = process.communicate()
    return process.wait(), errors


KINDS = ("start",) * 2 + ("compile",) * 2 + ("steps",) * 3 + ("saving",) * 3
"""Phases of a launch in which it is killed."""


def moment(kind: str, chance: random.Random, run: Path) -> tuple[Callable[[], bool], float]:
    """Choose a random moment of the next launch: (condition, seconds after it)."""
    launches, ahead = count_lines(run / "launches.jsonl"), chance.randrange(1, 6)
    before: list[int] = []

    def under_way() -> bool:
        """Return True once the records are truncated to the restored step."""
        return count_lines(run / "launches.jsonl") > launches

    def steps_are_done() -> bool:
        if not before and under_way():
            before.append(count_lines(run / "metrics.jsonl"))
        return bool(before) and count_lines(run / "metrics.jsonl") >= before[0] + ahead

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
    yaml_io.save(tmp_path / "train.yaml", config)
    for kind in chance.sample((*KINDS, "SIGTERM"), len(KINDS) + 1):
        condition, delay = moment("steps" if kind == "SIGTERM" else kind, chance, run)
        process = launch_code(TRAIN_WITH_PROBE, tmp_path / "train.yaml", JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
        code, errors = signal_at(process, signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL, condition, delay)
        print(f"{kind}: {count_lines(run / 'metrics.jsonl')} steps logged")
        assert code == (Preempted.exit_code if kind == "SIGTERM" else -signal.SIGKILL), errors
    train(config, hooks=[probe(2)])
    assert param_bytes(run) == param_bytes(reference)
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
    yaml_io.save(tmp_path / "train.yaml", config)
    process = launch("train", "--config", tmp_path / "train.yaml")
    code, errors = signal_at(process, signal.SIGTERM, lambda: count_lines(run / "metrics.jsonl") >= 2, 0.0)
    assert code == Preempted.exit_code, errors
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert f"stopped and saved after step {int(checkpoint.name)} of 300" in errors
    assert not (run / "model").exists()

    train(config)
    first, second = read_log(run / "launches.jsonl")
    assert (first["from_step"], second["from_step"]) == (0, int(checkpoint.name))
    assert param_bytes(run) == param_bytes(long_run)
    assert (run / "metrics.jsonl").read_bytes() == (long_run / "metrics.jsonl").read_bytes()
