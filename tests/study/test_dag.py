"""Stages run once, and their keys hold everything that decides their output."""

from pathlib import Path

from launcher import run_code

from jax_selftrain.study.dag import Stage, run_all


def test_a_stage_that_is_needed_twice_runs_once(tmp_path: Path):
    done: list[str] = []
    text = Stage("import", "text", {}, {"text": "a"}, lambda out: done.append("text"))
    models = [
        Stage("teach", f"model {seed}", {"seed": seed}, {"corpus": text}, lambda out, seed=seed: done.append(f"{seed}"))
        for seed in (0, 1)
    ]
    run_all(tmp_path, [text, models[0], text, models[1]])
    assert done == ["text", "0", "1"]
    run_all(tmp_path, [models[1]])  # the dependency is done already
    assert done == ["text", "0", "1"]


KILLED = """
import os, signal, sys
from pathlib import Path
from jax_selftrain.io.lease import lease
with lease(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_lease_of_a_process_that_was_killed_after_its_stage_is_removed(tmp_path: Path):
    stage = Stage("import", "text", {}, {"text": "a"}, lambda out: None)
    run_all(tmp_path, [stage])
    lease = tmp_path / f".{stage.name}.lease"
    run_code(KILLED, lease)
    assert lease.exists()
    run_all(tmp_path, [stage])
    assert not list(tmp_path.glob(".*"))
