"""Weights & Biases is asked for what it should be, by a stand-in for its package: the boundary, not the service."""

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
from jax_selftrain.io import atomic
from jax_selftrain.training import Hook, train


class RefusalError(Exception):
    """In place of `wandb.Error`."""


class Recorder:
    """What `wandb.init` returns, and what it was told."""

    def __init__(self, **options: Any):
        self.options, self.logged, self.finished = options, dict[int, dict[str, float]](), False

    def log(self, values: dict[str, float], *, step: int) -> None:
        assert not self.logged or step >= max(self.logged), "W&B drops what goes back"
        self.logged.setdefault(step, {}).update(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The W&B runs that were begun."""
    begun: list[Recorder] = []

    def init(**options: Any) -> Recorder:
        if options["project"] == "nobody's":
            raise RefusalError("nobody is logged in")
        begun.append(Recorder(**options))
        return begun[-1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=RefusalError))
    return begun


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
    identity = atomic.read_json(folder / "run.json")["identity"]
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


@pytest.mark.slow
def test_nothing_is_asked_of_it_unless_it_is_named(options: Callable[..., TrainConfig], runs: list[Recorder]):
    train(options(steps=1))
    assert runs == []


def test_what_it_refuses_is_said_in_one_sentence(options: Callable[..., TrainConfig], runs: list[Recorder]):
    with pytest.raises(InputError, match="--wandb nobody's: nobody is logged in; correct this"):
        train(options(wandb="nobody's"))
    assert train(options(wandb="")), "and the run goes on without it"


def test_a_missing_package_is_said_before_anything_is_written(
    options: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = options(wandb="project")
    with pytest.raises(InputError, match="--wandb needs the package wandb"):
        train(config)
    words = ["train", "--model", config.model, "--corpus", config.corpus, "--out", config.out, "--wandb", "project"]
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "pip install 'jax-selftrain[wandb]'" in line
    assert not Path(config.out).exists()
