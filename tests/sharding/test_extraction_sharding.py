"""Tests of `extraction` on several devices."""

import numpy as np
import pytest
from extraction_reference import BATCH, PREFIX, draw_greedy_paths, draw_random_sequences

from jax_selftrain import hub
from jax_selftrain.evals import extraction_metrics
from jax_selftrain.evals.suffix_probability import parse_sampling_policies


@pytest.mark.parametrize("mesh", [pytest.param("data=4", marks=pytest.mark.nightly), "data=2,model=2"])
def test_measures_do_not_depend_on_the_mesh(tiny_model, mesh):
    model = hub.load_model(tiny_model(), "data=1")
    sequences = np.concatenate([draw_greedy_paths(model)[:9], draw_random_sequences()[:8]])
    policies = parse_sampling_policies(["temperature=1,top-k=40", "temperature=0.7,top-p=0.9"])
    models = (model, hub.load_model(tiny_model(), mesh))
    alone, spread = (
        extraction_metrics(
            one, sequences, PREFIX, policies=policies, batch_tokens=BATCH, greedy_decode=False, token_scores=True
        )
        for one in models
    )
    for name, values in alone.items():
        np.testing.assert_allclose(spread[name], values, atol=2e-5, err_msg=name)  # 24 fp32 roundings of 1e-6
