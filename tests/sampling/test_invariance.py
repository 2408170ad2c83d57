"""A trained model gives the same samples everywhere, except at rounding ties."""

from functools import cache

import numpy as np
import pytest
from sampling_reference import draw_samples

from jax_selftrain.hub import LoadedModel, load_model
from jax_selftrain.sampling import SamplingParams
from jax_selftrain.sampling.counter_rng import per_sample_keys
from jax_selftrain.sampling.decode import DecodeSpec, SampleBatch

SEED, SAMPLES, TOKENS = 17, 256, 128
PARAMS = SamplingParams(start_id=1, stop_ids=(1, 2), max_tokens=TOKENS)
"""stories260k ends its stories with BOS (1)."""


@pytest.fixture(scope="module")
def load(stories260k):
    return cache(lambda spec: load_model(stories260k, spec))


def _sample(model: LoadedModel, num_slots: int, samples: int, sampling_params: SamplingParams) -> SampleBatch:
    """Draw samples 0 … samples−1 with `num_slots` slots per replica."""
    keys = per_sample_keys(SEED, np.arange(samples))
    drawn = draw_samples(DecodeSpec.from_model(model), sampling_params, model.params, keys, num_slots=num_slots)
    assert drawn.finite.all()
    return drawn


@pytest.fixture(scope="module")
def reference(load) -> SampleBatch:
    """One device, 64 rows."""
    return _sample(load("data=1,model=1"), 64, SAMPLES, PARAMS)


# ---------------------------------------------------------------- the real model


def test_stories_end_with_the_id_the_model_was_trained_on(load, reference):
    ended = reference.stopped
    assert 2 < ended.sum() < SAMPLES / 4
    assert set(reference.tokens[ended, reference.lengths[ended] - 1]) == {1}
    text = load("data=1,model=1").tokenizer.decode(reference.tokens[0])
    assert text.startswith("Once upon a time")


def test_log_probabilities_are_those_of_transformers(stories260k, reference):
    torch = pytest.importorskip("torch", reason="the independent reference needs torch")
    from transformers import AutoModelForCausalLM

    inputs = np.concatenate([np.full((SAMPLES, 1), PARAMS.start_id), reference.tokens[:, :-1]], axis=1)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(stories260k)(torch.from_numpy(inputs)).logits
    logprobs = torch.log_softmax(logits, dim=-1).numpy()
    logprobs = np.take_along_axis(logprobs, reference.tokens[:, :, None], axis=2)[:, :, 0]
    counted = np.arange(TOKENS) < reference.lengths[:, None]
    error = np.abs((logprobs * counted).sum(axis=1) - reference.logprobs) / reference.lengths
    assert error.max() < 1e-3  # observed: below 1e-6


# ---------------------------------------------------------------- meshes and batches
