"""Calls to Weights & Biases, recorded by a replacement of its package."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training_runs import Interruption, probe

from jax_selftrain import cli
from jax_selftrain.config import TrainConfig
from jax_selftrain.errors import InputError
from jax_selftrain.hub import LoadedModel
from jax_selftrain.io import json_files
from jax_selftrain.training import Hook, train


class RefusalError(Exception):
    """In place of `wandb.Error`."""


class Recorder:
    """Result of `wandb.init`, which records its calls."""

    def __init__(self, **options: Any):
        self.options, self.logged, self.finished = options, dict[int, dict[str, float]](), False

    def log(self, values: dict[str, float], *, step: int) -> None:
        assert not self.logged or step >= max(self.logged), "W&B drops what goes back"
        self.logged.setdefault(step, {}).update(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """W&B runs that were started."""
    started: list[Recorder] = []

    def init(**options: Any) -> Recorder:
        if options["project"] == "private":
            raise RefusalError("no login")
        started.append(Recorder(**options))
        return started[-1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=RefusalError))
    return started


def test_a_resumed_run_keeps_its_id_and_logs_metrics_and_measures(
    options: Callable[..., TrainConfig], runs: list[Recorder]
):
    def interrupt(step: int, model: LoadedModel) -> None:
        raise Interruption

    config = options(wandb="project", eval_every=3, eval_texts=("probe.jsonl",))
    with pytest.raises(Interruption):
        train(config, hooks=[probe(3), Hook(interrupt, steps=(5,))])
    folder = train(config, hooks=[probe(3)])
    first, second = runs
    identity = json_files.read_json(folder / "run.json")["identity"]
    for run in runs:
        assert run.options["project"] == "project"
        assert run.options["id"] == identity[:32]
        assert run.options["resume"] == "allow"
        assert run.options["config"]["learning_rate"] == config.learning_rate
        assert Path(run.options["dir"]) == folder
        assert run.finished
    assert sorted(first.logged) == [0, 1, 2, 3, 4, 5]
    assert sorted(second.logged) == [5, 6], "from the checkpoint of step 4 on"
    assert set(first.logged[0]) == {"probe/loss"}
    assert {"loss", "learning_rate", "tokens_per_second", "flops_per_second", "probe/loss"} <= set(second.logged[6])


def test_without_a_project_nothing_is_called(options: Callable[..., TrainConfig], runs: list[Recorder]):
    train(options(steps=1))
    assert runs == []


def test_an_error_of_wandb_is_one_sentence(options: Callable[..., TrainConfig], runs: list[Recorder]):
    with pytest.raises(InputError, match="--wandb private: no login; correct this"):
        train(options(wandb="private"))
    assert train(options(wandb="")), "the run works without it"


def test_a_missing_package_is_an_error_before_anything_is_written(
    options: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = options(wandb="project")
    with pytest.raises(InputError, match="--wandb needs the package wandb"):
        train(config)
    words = ["train", "--model", config.model, "--corpus", config.corpus, "--out", config.out, "--wandb", "project"]
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "pip install wandb" in line
    assert not Path(config.out).exists()
