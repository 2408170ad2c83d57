"""Tests of `hooks` on several devices."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_runs import Interruption, interrupt, losses, run_options

from jax_selftrain.config import TrainConfig
from jax_selftrain.hub import LoadedModel
from jax_selftrain.training import Hook, train

Options = Callable[..., TrainConfig]


EVALUATED: dict[str, Any] = {"eval_every": 2, "eval_texts": ("of a hook.jsonl",)}


def first_scale(step: int, model: LoadedModel) -> dict[str, float]:
    """Return the sum of a parameter."""
    return {"probe/nll": float(np.asarray(model.params["final_norm"]["scale"], np.float64).sum())}


def measuring(function: Callable[[int, LoadedModel], Mapping[str, float]], **changes: Any) -> Hook:
    options: dict[str, Any] = {
        "every": 2, "run_at_start_and_end": True, "metric_names": ("probe/nll",), "measured": {"probe": "as it is"},
    }  # fmt: skip
    return Hook(function, **{**options, **changes})


def curve(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reference_run(small_model: Path, corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that `options(**EVALUATED)` describes, never interrupted."""
    config = run_options((small_model, corpus_folder, tmp_path_factory.mktemp("reference_run") / "run"), **EVALUATED)
    return train(config, hooks=[measuring(first_scale)])


def test_interrupted_run_resumes_on_another_mesh_along_the_same_curve(options: Options, reference_run: Path):
    with pytest.raises(Interruption):
        train(options(**EVALUATED), hooks=[measuring(first_scale), Hook(interrupt, steps=(3,))])
    run = train(options(**EVALUATED, mesh="data=4,model=2", preset="replicated"), hooks=[measuring(first_scale)])
    assert curve(run)[:2] == curve(reference_run)[:2]
    measured, expected = ([line["probe/nll"] for line in curve(one)] for one in (run, reference_run))
    np.testing.assert_allclose(measured, expected, rtol=1e-5)  # fp32 sums in another order from step 3 on
    np.testing.assert_allclose(losses(run), losses(reference_run), rtol=1e-5)
