"""Killed and restarted runs end with the bytes of undisturbed runs."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launcher import CommandProcess, launch

from jax_selftrain.config import RunConfig, yaml_io

MOMENTS = (
    "score-*.json",
    "sample-*/shard-000000.parquet",
    "train-*/checkpoints",
    "train-*.json",
    "extract-*/extract.json",
)
"""A kill comes a random moment after each of these has appeared in `stages`: during a stage, or between stages."""


def start(config: RunConfig, folder: Path) -> CommandProcess:
    yaml_io.save(folder / "run.yaml", config)
    # All starts share compiled programs.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return launch("run", "--config", folder / "run.yaml", **cache)


@pytest.mark.nightly
def test_killed_runs_end_with_the_same_bytes(
    finished_run: Path, options: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config, moments, kills = options(tmp_path / "out"), random.Random(7), 0
    for appears in MOMENTS:
        process = start(config, tmp_path)
        process.wait_until(lambda appears=appears: any((tmp_path / "out" / "stages").glob(appears)))
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        _, output = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), output
        kills += process.returncode != 0
    assert kills >= 3, "the moments come too late for this machine"
    process = start(config, tmp_path)
    _, output = process.communicate()
    assert process.returncode == 0, output
    for name in ("results.json", "report.html"):
        assert (tmp_path / "out" / name).read_bytes() == (finished_run / name).read_bytes()
    left = [path for path in (tmp_path / "out").rglob(".*") if path.name != ".lease"]
    assert not left, "no temporary files are left"
