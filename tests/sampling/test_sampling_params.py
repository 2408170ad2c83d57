"""Sampling parameters: transformers' truncation, and invalid options."""

import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_reference import random_logits

from jax_selftrain.config import SampleConfig, yaml_io
from jax_selftrain.errors import InputError
from jax_selftrain.hub import SpecialTokens
from jax_selftrain.sampling.categorical import categorical, level_sizes
from jax_selftrain.sampling.sampling_params import (
    SamplingParams,
    full_logsumexp,
    make_sampling_params,
    warp_logits,
)

PLAIN = SamplingParams(start_ids=(0,), stop_ids=(), max_tokens=1)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.3},
        {"top_k": 1},
        {"top_k": 20},
        {"top_k": 500},
        {"top_p": 0.9},
        {"top_p": 0.3},
        {"top_p": 1e-6},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 1.5, "top_k": 100, "top_p": 0.95},
    ],
    ids=str,
)
def test_truncation_is_that_of_transformers(options):
    torch = pytest.importorskip("torch", reason="transformers' processors need torch")
    from transformers.generation import logits_process as hf

    warpers = {  # in the order of GenerationMixin._get_logits_processor
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
    }
    logits = random_logits(32, 200, 2.0)
    logits -= logits.max(axis=-1, keepdims=True)  # as `warp_logits` does before it divides
    scores = torch.from_numpy(logits.copy())
    for name, warper in warpers.items():
        if name in options:
            scores = warper(options[name])(None, scores)
    expected = scores.numpy()
    got = np.asarray(warp_logits(jnp.asarray(logits), replace(PLAIN, **options)))
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    np.testing.assert_allclose(got, expected, rtol=1e-6)  # one rounding of the division by the temperature


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.9}], ids=str)
def test_equal_logits_are_kept_or_dropped_together(options):
    logits = np.array([[0.0, 1.0, 3.0, 3.0, 3.0, -2.0]], np.float32)
    got = np.asarray(warp_logits(jnp.asarray(logits), replace(PLAIN, **options)))
    np.testing.assert_array_equal(np.isfinite(got), logits == 3.0)


def test_padding_ids_are_excluded_before_truncation():
    logits = random_logits(32, 200, 2.0)
    logits[:, 150:] += 100.0
    sampling_params = replace(PLAIN, num_valid_ids=150, top_k=5, top_p=0.95, min_p=0.01)
    got = np.asarray(warp_logits(jnp.asarray(logits), sampling_params))
    expected = np.asarray(warp_logits(jnp.asarray(logits[:, :150]), replace(sampling_params, num_valid_ids=None)))
    assert np.isneginf(got[:, 150:]).all()
    np.testing.assert_array_equal(got[:, :150], expected)


@pytest.mark.parametrize("temperature", [1e-6, 1e-9, 1e-12, 1e-30, 1e-50])
def test_low_temperatures_are_greedy(temperature: float):
    logits = random_logits(32, 200, 2.0) + np.float32(60)
    draw = jax.jit(lambda rows: categorical(warp_logits(rows, replace(PLAIN, temperature=temperature)), bits))
    bits = jnp.full((32, len(level_sizes(200))), np.uint32(2**32 - 1))
    token, logsumexp = draw(jnp.asarray(logits))
    np.testing.assert_array_equal(token, logits.argmax(axis=-1))
    warped = np.asarray(warp_logits(jnp.asarray(logits), replace(PLAIN, temperature=temperature)))
    np.testing.assert_array_equal(np.take_along_axis(warped, np.asarray(token)[:, None], 1)[:, 0] - logsumexp, 0.0)


def test_high_temperatures_are_uniform():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampling_params = replace(PLAIN, temperature=1e39, num_valid_ids=150)
        warped = np.asarray(warp_logits(jnp.asarray(random_logits(4, 200, 2.0)), sampling_params))
    np.testing.assert_allclose(warped[:, :150], 0.0, atol=1e-30)
    assert np.isneginf(warped[:, 150:]).all()


def test_ids_that_are_no_token_are_excluded():
    logits = random_logits(4, 200, 2.0)
    sampling_params = replace(PLAIN, num_valid_ids=150, unused_ids=(3, 149))
    excluded = np.isneginf(np.asarray(warp_logits(jnp.asarray(logits), sampling_params)))
    assert np.flatnonzero(excluded[0]).tolist() == [3, 149, *range(150, 200)]
    warped = warp_logits(jnp.asarray(logits), sampling_params)
    whole = full_logsumexp(jnp.asarray(logits), sampling_params, jax.nn.logsumexp(warped, axis=-1))
    np.testing.assert_allclose(whole, np.log(np.exp(logits.astype(np.float64)).sum(axis=-1)), rtol=1e-6)


def test_disabled_steps_compile_to_nothing():
    logits = jnp.asarray(random_logits(32, 200, 2.0))
    np.testing.assert_array_equal(warp_logits(logits, PLAIN), logits)
    cooler, both = replace(PLAIN, temperature=0.5, min_p=0.1), replace(PLAIN, top_k=9, top_p=0.9)
    for sampling_params, searches in ((PLAIN, 0), (cooler, 0), (both, 2)):
        text = jax.jit(warp_logits, static_argnums=1).lower(logits, sampling_params).as_text()
        assert text.count("stablehlo.while") == searches
        assert "sort" not in text


def test_zero_and_minus_zero_are_equal():
    logits = jnp.array([[0.0, -0.0, -1.0, 0.0]], jnp.float32)
    got = np.asarray(warp_logits(logits, replace(PLAIN, top_k=1)))
    np.testing.assert_array_equal(np.isfinite(got), [[True, True, False, True]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "--temperature 0.0: must be a finite number above 0"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"temperature": float("inf")}, "--temperature"),
        ({"top_p": 0.0}, "--top-p 0.0: must be above 0 and at most 1"),
        ({"top_p": 1.5}, "--top-p"),
        ({"min_p": -0.1}, "--min-p"),
        ({"min_p": 2.0}, "--min-p"),
        ({"top_k": -1}, "--top-k"),
        ({"samples": 0}, "--samples 0: must be at least 1"),
        ({"max_tokens": 0}, "--max-tokens 0: must be at least 1"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"samples_per_shard": -3}, "--samples-per-shard -3: must be at least 1"),
        ({"seed": -1}, "--seed -1: must be between 0"),
        ({"seed": 2**64}, "must be between 0"),
    ],
    ids=str,
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(InputError) as error:
        yaml_io.check_ranges(SampleConfig(**options))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def _sampling_params(config: SampleConfig, **changes: Any) -> SamplingParams:
    special = SpecialTokens(bos_token_id=1, eos_token_id=2, eos_token_ids=(2,), tokenizer_length=90)
    model: Any = SimpleNamespace(vocab_size=100, max_positions=64)
    return make_sampling_params(config, model, replace(special, **changes))


def test_options_override_defaults_of_the_model():
    config = SampleConfig(model="m", max_tokens=64)
    assert _sampling_params(config) == SamplingParams(start_ids=(1,), stop_ids=(2,), max_tokens=64, num_valid_ids=90)
    chosen = _sampling_params(replace(config, start_id=95, stop_ids=(7, 3, 7)))
    assert (chosen.start_ids, chosen.stop_ids) == ((95,), (3, 7))
    assert _sampling_params(replace(config, stop_ids=())).stop_ids == ()
    assert _sampling_params(config, tokenizer_length=None).num_valid_ids is None
    assert _sampling_params(config, tokenizer_length=150).num_valid_ids is None


def test_start_tokens_take_positions_and_an_empty_start_text_is_refused():
    special = SpecialTokens(bos_token_id=1, eos_token_id=2, eos_token_ids=(2,), tokenizer_length=90)
    model: Any = SimpleNamespace(vocab_size=100, max_positions=64)

    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(letter) - 90 for letter in text]}

    config = SampleConfig(model="m", max_tokens=60, start_text="abcde")
    assert make_sampling_params(config, model, special, tokenizer).start_ids == (7, 8, 9, 10, 11)
    with pytest.raises(InputError, match="positions of m after 6 start tokens; ask for at most 59"):
        make_sampling_params(replace(config, add_special_tokens=True), model, special, tokenizer)
    with pytest.raises(InputError, match="--start-text '': has no tokens"):
        make_sampling_params(replace(config, start_text=""), model, special, tokenizer)


@pytest.mark.parametrize(
    ("options", "model", "message"),
    [
        ({"stop_ids": (2, 90)}, {}, "--stop-ids 90 is outside the vocabulary of m, whose tokens are 0 … 89"),
        ({"stop_ids": (-1,)}, {}, "--stop-ids -1 is outside the vocabulary"),
        ({"start_id": 100}, {}, "--start-id 100 is outside the vocabulary"),
        ({"max_tokens": 65}, {}, "--max-tokens 65 is longer than the 64 positions of m; ask for at most 64"),
        ({}, {"bos_token_id": None}, "choose one with --start-id"),
        ({"min_tokens": 9}, {}, "--min-tokens 9 is more than --max-tokens 8"),
        ({"start_text": "a", "start_id": 1}, {}, "--start-id and --start-text exclude each other"),
        ({"start_text": "a"}, {}, "m: has no tokenizer for --start-text; give --start-id"),
        ({"add_special_tokens": True}, {}, "--add-special-tokens concerns --start-text"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_the_model_are_refused(options, model, message):
    with pytest.raises(InputError) as error:
        _sampling_params(SampleConfig(model="m", **{"max_tokens": 8, **options}), **model)
    assert message in str(error.value)
