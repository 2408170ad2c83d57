"""Stages run once, and their keys hold everything that decides their output."""

from pathlib import Path

import pytest
from launcher import run_code

from jax_selftrain.config import KeepModels
from jax_selftrain.errors import InputError
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


@pytest.mark.parametrize("keep", ["all", "last", "none"])
def test_models_are_kept_as_requested_and_made_again_for_a_new_reader(tmp_path: Path, keep: KeepModels):
    runs: list[str] = []

    def train(out: Path) -> None:
        runs.append("train")
        for name in ("model", "checkpoints"):
            (out / name).mkdir()
        (out / "run.json").write_text("{}")

    trained = Stage("train", "train", {}, {"model": "a"}, train, model_bytes=4)
    folder = tmp_path / trained.name

    def reader(name: str) -> Stage:
        def read(out: Path) -> None:
            assert (folder / "model").is_dir()
            runs.append(name)
            if name == "fail" and runs.count("fail") == 1:
                raise InputError("stopped")

        return Stage("score", name, {"name": name}, {"model": trained}, read)

    readers = [reader("one"), reader("fail"), reader("late")]
    with pytest.raises(InputError, match="stopped"):
        run_all(tmp_path, readers[:2], keep)
    assert (folder / "model").is_dir()  # a reader is missing
    run_all(tmp_path, readers[:2], keep)
    assert runs == ["train", "one", "fail", "fail"]
    for _ in range(2):
        assert (folder / "model").is_dir() == (keep != "none")
        assert (folder / "checkpoints").is_dir() == (keep == "all")
        assert (folder / "run.json").exists()
        run_all(tmp_path, readers[:2], keep)  # nothing to do
    assert len(runs) == 4
    run_all(tmp_path, readers, keep)
    assert runs[4:] == (["train", "late"] if keep == "none" else ["late"])
    assert (folder / "model").is_dir() == (keep != "none")
    assert not list(tmp_path.glob(".*"))
