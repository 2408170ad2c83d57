"""Tests of `loop` on several devices."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from training_runs import Interruption, interrupt, losses

from jax_selftrain.config import TrainConfig
from jax_selftrain.io.jsonl import read_log
from jax_selftrain.training import Hook, train


def test_interrupted_run_resumes_on_another_mesh(tmp_path: Path, options: Callable[..., TrainConfig]):
    reference = train(options(mesh="data=1", out=str(tmp_path / "reference")))
    with pytest.raises(Interruption):
        train(options(mesh="data=1"), hooks=[Hook(interrupt, steps=(3,))])
    run = train(options(mesh="data=2,model=2"))
    # fp32 sums in another order from step 3 on.
    np.testing.assert_allclose(losses(run), losses(reference), rtol=1e-5)
    launches = read_log(run / "launches.jsonl")
    assert [(launch["from_step"], launch["mesh"]) for launch in launches] == [
        (0, {"data": 1, "model": 1}),
        (2, {"data": 2, "model": 2}),
    ]
