"""Real processes, really killed: whatever the moment, the next start ends with the bits of an undisturbed run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from training_runs import weights

from jax_selftrain import settings
from jax_selftrain.config import TrainConfig
from jax_selftrain.errors import Stopped
from jax_selftrain.training import train

PROGRAM = """
import sys
from jax_selftrain import settings
from jax_selftrain.config import TrainConfig
from jax_selftrain.errors import SelftrainError
from jax_selftrain.training import train
try:
    train(settings.load(TrainConfig, sys.argv[1]))
except SelftrainError as error:
    print(type(error).__name__, error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def start(config: TrainConfig, folder: Path) -> subprocess.Popen[str]:
    settings.save(folder / "train.yaml", config)
    command: Sequence[str] = [sys.executable, "-c", PROGRAM, str(folder / "train.yaml")]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until `path` has `count` lines (or the process ended by itself)."""
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < count):
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_run_ends_with_the_same_bits(options: Callable[..., TrainConfig], tmp_path: Path):
    undisturbed = train(options(out=str(tmp_path / "undisturbed"), steps=30))
    config = options(steps=30)
    run, moments = Path(config.out), random.Random(20)
    for lines in (1, 9, 19):  # then at a random moment of the step or of the checkpoint being written behind it
        process = start(config, tmp_path)
        wait_for_lines(run / "metrics.jsonl", lines, process)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        _, said = process.communicate()
        assert process.returncode == -signal.SIGKILL, said
    process = start(config, tmp_path)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert weights(run) == weights(undisturbed)
    assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    hidden = [path for folder in (run, run / "steps") for path in folder.iterdir() if path.name.startswith(".")]
    assert not hidden, "nothing half-written is left behind"


@pytest.mark.slow
def test_sigterm_saves_and_the_next_start_goes_on_exactly(options: Callable[..., TrainConfig], tmp_path: Path):
    undisturbed = train(options(out=str(tmp_path / "undisturbed"), steps=300, checkpoint_every=300))
    config = options(steps=300, checkpoint_every=300)
    run = Path(config.out)
    process = start(config, tmp_path)
    wait_for_lines(run / "metrics.jsonl", 2, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == Stopped.exit_code, said
    (checkpoint,) = (run / "steps").iterdir()
    assert f"stopped and saved after step {int(checkpoint.name)} of 300" in said
    assert not (run / "model").exists()

    train(config)
    first, second = (json.loads(line) for line in (run / "launches.jsonl").read_text().splitlines())
    assert (first["from_step"], second["from_step"]) == (0, int(checkpoint.name))
    assert weights(run) == weights(undisturbed)
    assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
