"""Tests of `extraction` on several devices."""

import numpy as np
import pytest

from jax_selftrain import hub
from jax_selftrain.evals import extraction_metrics
from jax_selftrain.evals.suffix_probability import parse_sampling_policies
from jax_selftrain.sampling import SamplingParams, generate

PREFIX, SUFFIX = 8, 24


GREEDY = SamplingParams(max_tokens=SUFFIX, temperature=0)


BATCH = 1024


@pytest.fixture(scope="module")
def model(tiny_model):
    return hub.load_model(tiny_model(), "data=1")


@pytest.fixture(scope="module")
def greedy_paths(model):
    """32 sequences whose suffix is the greedy continuation of the prefix."""
    prefixes = np.random.default_rng(0).integers(3, 512, (32, PREFIX)).astype(np.int32)
    return np.concatenate([prefixes, np.array(generate(model, prefixes.tolist(), GREEDY), np.int32)], axis=1)


@pytest.fixture(scope="module")
def random_sequences():
    return np.random.default_rng(1).integers(3, 512, (32, PREFIX + SUFFIX)).astype(np.int32)


@pytest.mark.parametrize("mesh", ["data=4", "data=2,model=2"])
def test_measures_do_not_depend_on_the_mesh(model, tiny_model, greedy_paths, random_sequences, mesh):
    sequences = np.concatenate([greedy_paths[:9], random_sequences[:8]])
    policies = parse_sampling_policies(["temperature=1,top-k=40", "temperature=0.7,top-p=0.9"])
    models = (model, hub.load_model(tiny_model(), mesh))
    alone, spread = (
        extraction_metrics(one, sequences, PREFIX, policies=policies, batch_tokens=BATCH, greedy_decode=False)
        for one in models
    )
    for name, values in alone.items():
        np.testing.assert_allclose(spread[name], values, atol=2e-5, err_msg=name)  # 24 fp32 roundings of 1e-6
