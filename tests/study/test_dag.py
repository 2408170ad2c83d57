"""Stages run once, and their keys hold everything that decides their output."""

from pathlib import Path

import pytest
from launcher import run_code

from jax_selftrain.config import KeepModels
from jax_selftrain.errors import InputError
from jax_selftrain.study.dag import Stage, list_remaining, peak_bytes, run_all


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


def test_a_chain_of_removed_models_is_made_again(tmp_path: Path):
    """The second model is trained from the first; a plan counts both."""
    runs: list[str] = []

    def make(name: str, before: Stage | None) -> Stage:
        def train(out: Path) -> None:
            assert before is None or (tmp_path / before.name / "model").is_dir()
            runs.append(name)
            (out / "model").mkdir()

        return Stage("train", name, {"name": name}, {"model": before or "a"}, train, model_bytes=4)

    first = make("first", None)
    second = make("second", first)
    late = [
        Stage("score", name, {"name": name}, {"model": second}, lambda out, name=name: runs.append(name))
        for name in ("one", "two")
    ]
    assert list_remaining(tmp_path, [first, second, late[0]]) == [first, second, late[0]]
    run_all(tmp_path, late[:1], "none")
    assert list_remaining(tmp_path, [first, second, *late]) == [first, second, late[1]]
    run_all(tmp_path, late, "none")
    assert runs == ["first", "second", "one", "first", "second", "two"]
    assert not list(tmp_path.glob("*/model"))
    assert list_remaining(tmp_path, [first, second, *late]) == []


def test_the_size_on_disk_is_that_of_the_models_that_are_still_read():
    trained = [Stage("train", f"{n}", {"n": n}, {}, print, model_bytes=10) for n in range(3)]
    scores = [Stage("score", f"{n}", {"n": n}, {"model": one}, print) for n, one in enumerate(trained)]
    noise = Stage("noise", "noise", {}, {"base": trained[0]}, print, model_bytes=10)
    in_order = [stage for pair in zip(trained, scores, strict=True) for stage in pair]
    assert peak_bytes([*in_order, noise], "none", 2) == 10 + 10 + 60  # the first model until its noise, and one run
    assert peak_bytes([*in_order[:2], noise, *in_order[2:]], "none", 2) == 10 + 60  # noise is never read
    assert peak_bytes([*in_order, noise], "last", 2) == 3 * 10 + 60
    assert peak_bytes([*in_order, noise], "all", 2) == 3 * (10 + 60) + 10
