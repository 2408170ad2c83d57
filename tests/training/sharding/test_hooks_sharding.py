"""Tests of `hooks` on several devices."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from training_runs import EVALUATED, Interruption, curve, first_scale, interrupt, losses, measuring

from jax_selftrain.config import TrainConfig
from jax_selftrain.training import Hook, train

Options = Callable[..., TrainConfig]


@pytest.mark.nightly
def test_interrupted_run_resumes_on_another_mesh_along_the_same_curve(options: Options, evaluated_run: Path):
    with pytest.raises(Interruption):
        train(options(**EVALUATED), hooks=[measuring(first_scale), Hook(interrupt, steps=(3,))])
    run = train(options(**EVALUATED, mesh="data=4,model=2", preset="replicated"), hooks=[measuring(first_scale)])
    assert curve(run)[:2] == curve(evaluated_run)[:2]
    measured, expected = ([line["probe/nll"] for line in curve(one)] for one in (run, evaluated_run))
    np.testing.assert_allclose(measured, expected, rtol=1e-5)  # fp32 sums in another order from step 3 on
    np.testing.assert_allclose(losses(run), losses(evaluated_run), rtol=1e-5)
