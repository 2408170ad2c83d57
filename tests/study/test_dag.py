"""Stages: each is done once, whoever needs it."""

import subprocess
import sys
from pathlib import Path

from jax_selftrain.study.dag import Stage, run_all


def test_a_stage_that_is_named_twice_is_done_once_and_the_work_ends(tmp_path: Path):
    done: list[str] = []
    text = Stage("import", "text", {}, {"text": "a"}, lambda out: done.append("text"))
    models = [
        Stage("teach", f"model {seed}", {"seed": seed}, {"corpus": text}, lambda out, seed=seed: done.append(f"{seed}"))
        for seed in (0, 1)
    ]
    run_all(tmp_path, [text, models[0], text, models[1]])
    assert done == ["text", "0", "1"]
    run_all(tmp_path, [models[1]])  # what it needs is found done
    assert done == ["text", "0", "1"]


KILLED = """
import os, signal, sys
from pathlib import Path
from jax_selftrain import storage
with storage.lease(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_lease_of_one_that_was_killed_when_its_work_was_done_is_removed(tmp_path: Path):
    stage = Stage("import", "text", {}, {"text": "a"}, lambda out: None)
    run_all(tmp_path, [stage])
    lease = tmp_path / f".{stage.name}.lease"
    subprocess.run([sys.executable, "-c", KILLED, str(lease)], check=False)
    assert lease.exists()
    run_all(tmp_path, [stage])
    assert not list(tmp_path.glob(".*"))
