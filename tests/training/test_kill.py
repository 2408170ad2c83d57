"""Real processes, really killed: whatever the moment, the next start ends with the bits of an undisturbed run."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from training_runs import losses, run_options, weights

from jax_selftrain import settings
from jax_selftrain.config import TrainConfig
from jax_selftrain.errors import Stopped
from jax_selftrain.training import train

PROGRAM = """
import sys
import jax
from jax_selftrain import settings
from jax_selftrain.config import TrainConfig
from jax_selftrain.errors import SelftrainError
from jax_selftrain.training import train
if len(sys.argv) > 2:
    coordinator, processes, index = sys.argv[2:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, int(processes), int(index))
try:
    train(settings.load(TrainConfig, sys.argv[1]))
except SelftrainError as error:
    print(type(error).__name__, error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def start(config: TrainConfig, folder: Path, *arguments: str, devices: int = 8) -> subprocess.Popen[str]:
    settings.save(folder / "train.yaml", config)
    command: Sequence[str] = [sys.executable, "-c", PROGRAM, str(folder / "train.yaml"), *arguments]
    flags = re.sub(r"(?<=device_count=)\d+", str(devices), os.environ["XLA_FLAGS"])
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "XLA_FLAGS": flags})


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until `path` has `count` lines (or the process ended by itself)."""
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < count):
        time.sleep(0.005)


@pytest.fixture(scope="module")
def long_run(small_model: Path, corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hundred steps, never interrupted."""
    folder = tmp_path_factory.mktemp("long") / "run"
    return train(run_options((small_model, corpus_folder, folder), steps=300, checkpoint_every=300))


@pytest.mark.slow
def test_killed_run_ends_with_the_same_bits(options: Callable[..., TrainConfig], tmp_path: Path):
    undisturbed = train(options(out=str(tmp_path / "undisturbed"), steps=20))
    config = options(steps=20)
    run, moments = Path(config.out), random.Random(20)
    for lines in (1, 7, 13):  # then at a random moment of the step or of the checkpoint being written behind it
        process = start(config, tmp_path)
        wait_for_lines(run / "metrics.jsonl", lines, process)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        _, said = process.communicate()
        assert process.returncode == -signal.SIGKILL, said
    train(config)
    assert weights(run) == weights(undisturbed)
    assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    hidden = [path for folder in (run, run / "steps") for path in folder.iterdir() if path.name.startswith(".")]
    assert not hidden, "nothing half-written is left behind"


@pytest.mark.slow
def test_sigterm_saves_and_the_next_start_goes_on_exactly(
    long_run: Path, options: Callable[..., TrainConfig], tmp_path: Path
):
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
    assert weights(run) == weights(long_run)
    assert (run / "metrics.jsonl").read_bytes() == (long_run / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both_and_one_process_can_go_on(
    long_run: Path, options: Callable[..., TrainConfig], tmp_path: Path
):
    """As on a pod: each process holds half of the mesh, a preempted host takes the others with it."""
    config = options(steps=300, checkpoint_every=300, mesh="data=2")
    run = Path(config.out)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    processes = [start(config, tmp_path, coordinator, "2", str(index), devices=1) for index in range(2)]
    wait_for_lines(run / "metrics.jsonl", 2, processes[0])
    processes[0].send_signal(signal.SIGTERM)
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [Stopped.exit_code] * 2, said
    (checkpoint,) = (run / "steps").iterdir()
    assert all(f"stopped and saved after step {int(checkpoint.name)} of 300" in text for text in said)

    train(config)  # here, on two simulated devices
    launches = [json.loads(line) for line in (run / "launches.jsonl").read_text().splitlines()]
    assert [(launch["from_step"], launch["processes"]) for launch in launches] == [(0, 2), (int(checkpoint.name), 1)]
    # Gloo adds in another order than one process does; three hundred Adam steps amplify the rounding.
    np.testing.assert_allclose(losses(run), losses(long_run), rtol=1e-3)
