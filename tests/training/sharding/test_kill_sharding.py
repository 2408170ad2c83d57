"""Tests of `kill` on several devices."""

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from process_group import start_processes, wait_for_all
from training_runs import count_lines, losses

from jax_selftrain.config import TrainConfig, yaml_io
from jax_selftrain.errors import Preempted
from jax_selftrain.io.jsonl import read_log
from jax_selftrain.training import train


@pytest.mark.nightly
def test_sigterm_to_one_of_two_processes_stops_both_and_one_process_can_resume(
    long_run: Path, options: Callable[..., TrainConfig], tmp_path: Path
):
    """On a pod, a preempted host stops the others, too."""
    config = options(steps=300, checkpoint_every=300, mesh="data=2")
    run = Path(config.out)
    yaml_io.save(tmp_path / "train.yaml", config)
    processes = start_processes(["train", "--config", tmp_path / "train.yaml"], 2, devices=1)
    processes[0].wait_until(lambda: count_lines(run / "metrics.jsonl") >= 2)
    processes[0].send_signal(signal.SIGTERM)
    codes, errors = wait_for_all(processes)
    assert codes == [Preempted.exit_code] * 2, errors
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert all(f"stopped and saved after step {int(checkpoint.name)} of 300" in text for text in errors)

    train(config)  # here, on two simulated devices
    launches = read_log(run / "launches.jsonl")
    assert [(launch["from_step"], launch["processes"]) for launch in launches] == [(0, 2), (int(checkpoint.name), 1)]
    # Gloo adds in another order than one process does; three hundred Adam steps amplify the rounding.
    np.testing.assert_allclose(losses(run), losses(long_run), rtol=1e-3)
