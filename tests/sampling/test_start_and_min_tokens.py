"""Samples after several start tokens, and without a stop id in their first tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models_factory import BOS, BOS_ID
from sampling_reference import ENDING, SAMPLE_FIELDS, SMALL_CONFIG, SmallModel, draw_samples
from scipy import stats

from jax_selftrain.config import SampleConfig
from jax_selftrain.hub import load_model
from jax_selftrain.models.kv_cache import TAIL_LEN
from jax_selftrain.sampling import SamplingParams, sample
from jax_selftrain.sampling.counter_rng import per_sample_keys
from jax_selftrain.sampling.decode import DecodeSpec
from jax_selftrain.sampling.generate import generate

small_model = cache(SmallModel)
nightly = pytest.mark.nightly


def start_of(length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(0).integers(3, SMALL_CONFIG.vocab_size, length).tolist())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def with_start(start_ids: tuple[int, ...], tokens: np.ndarray) -> np.ndarray:
    return np.concatenate([np.tile(start_ids, (len(tokens), 1)), tokens], axis=1).astype(np.int32)


@pytest.mark.parametrize(
    ("cache_dtype", "length"),
    [
        (None, 2 * TAIL_LEN + 6),
        ("int8", TAIL_LEN + 1),
        *(pytest.param(None, length, marks=nightly) for length in (2, TAIL_LEN, TAIL_LEN + 1)),
        *(pytest.param("int8", length, marks=nightly) for length in (2, TAIL_LEN, 2 * TAIL_LEN + 6)),
    ],
)
def test_log_probabilities_after_start_tokens_are_those_of_the_full_forward_pass(cache_dtype, length: int):
    """Some or none of the start tokens are prefilled, some or none forced."""
    model, params = small_model(), replace(ENDING, start_ids=start_of(length))
    spec = replace(model.spec, cache_dtype=cache_dtype)
    drawn = draw_samples(spec, params, model.params, per_sample_keys(0, np.arange(48)), num_slots=16)  # refills slots
    assert 0.3 < drawn.stopped.mean() < 1
    logprobs = log_softmax(model.logits(with_start(params.start_ids, drawn.tokens[:, :-1]))[:, length - 1 :])
    logprobs = np.take_along_axis(logprobs, drawn.tokens[:, :, None], axis=2)[:, :, 0]
    counted = np.arange(drawn.tokens.shape[1]) < drawn.lengths[:, None]
    # fp32: about 1e-6 of noise per logit, and sums of up to 70 terms. int8 rounds keys, values to 1/254 of a maximum;
    # a wrong position or scale changes a token by more than 0.3.
    error = np.abs(drawn.logprobs - (logprobs * counted).sum(axis=1)) / (1 if cache_dtype is None else drawn.lengths)
    assert error.max() < (1e-4 if cache_dtype is None else 0.03)


@pytest.mark.parametrize("length", [pytest.param(2, marks=nightly), TAIL_LEN + 1])
def test_samples_after_start_tokens_are_those_of_generation_from_a_prompt(stories260k, length: int):
    """`generate` prefills each prompt by itself, and draws with the same random bits."""
    model = load_model(stories260k, "data=1")
    start = tuple(model.tokenizer("Once upon a time there was a little cat. " * 9)["input_ids"][:length])
    assert len(start) == length
    params = SamplingParams(start_ids=start, stop_ids=(1, 2), max_tokens=48)
    drawn = draw_samples(
        DecodeSpec.from_model(model), params, model.params, per_sample_keys(5, np.arange(24)), num_slots=8
    )
    expected = generate(model, [start] * 24, params, seed=5)
    assert [row[:n].tolist() for row, n in zip(drawn.tokens, drawn.lengths, strict=True)] == expected


@pytest.mark.parametrize("n", [1024, pytest.param(4096, marks=pytest.mark.nightly)])
def test_first_tokens_after_start_tokens_follow_the_distribution_of_transformers(stories260k: Path, n: int):
    """Chi-square against transformers; the level is 1e-4."""
    torch = pytest.importorskip("torch", reason="the independent reference needs torch")
    from transformers import AutoModelForCausalLM

    model = load_model(stories260k, "data=1")
    start = tuple(model.tokenizer("Tom had a red ball and a big, brown dog. One sunny day he")["input_ids"])
    params = SamplingParams(start_ids=start, stop_ids=(1, 2), max_tokens=1, temperature=1.25)
    keys = per_sample_keys(0, np.arange(n))
    drawn = draw_samples(DecodeSpec.from_model(model), params, model.params, keys, num_slots=1024)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(stories260k)(torch.tensor([start])).logits[0, -1]
    expected = n * torch.softmax(logits.double() / 1.25, -1).numpy()
    order = np.argsort(-expected)
    cell = np.minimum(np.cumsum(expected[order]) // 20, n // 20 - 1).astype(int)  # at least 20 samples in a cell
    counts = np.bincount(drawn.tokens[:, 0], minlength=len(expected))
    observed, wanted = np.bincount(cell, counts[order]), np.bincount(cell, expected[order])
    kept = wanted > 0
    assert stats.chisquare(observed[kept], wanted[kept] * n / wanted[kept].sum()).pvalue > 1e-4


@pytest.fixture
def qwen_without_bos(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A model whose tokenizer has no BOS token, while its config names one, as Qwen2.5."""
    folder = shutil.copytree(tiny_model("qwen2"), tmp_path / "qwen")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            content = json.loads((folder / name).read_text())
            content.pop("bos_token", None)
            (folder / name).write_text(json.dumps(content))
    assert load_model(folder, "data=1").tokenizer.bos_token_id is None
    return folder


def test_a_start_text_replaces_the_start_token(qwen_without_bos: Path, tmp_path: Path):
    config = SampleConfig(model=str(qwen_without_bos), samples=8, max_tokens=8, batch_size=8, mesh="data=1")
    tokenizer = load_model(qwen_without_bos, "data=1").tokenizer

    def start(text: str, **options: Any) -> list[int]:
        corpus = sample(replace(config, out=str(tmp_path / f"{text!r} {options}"), start_text=text, **options))
        return corpus.manifest["policy"].get("start_ids") or [corpus.start_id]

    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert start("\n") == newline
    assert sample(replace(config, out=str(tmp_path / "default"))).start_id == BOS_ID  # the config names it
    # Special tokens are recognized; they are not added.
    text = f"{BOS} user\n"
    assert start(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert start(text)[0] == BOS_ID


def test_bos_is_doubled_by_the_switch_alone(stories260k: Path, tmp_path: Path):
    config = SampleConfig(
        model=str(stories260k), samples=8, max_tokens=8, batch_size=8, mesh="data=1", start_text="<s>"
    )
    one = sample(replace(config, out=str(tmp_path / "one")))
    assert "start_ids" not in one.manifest["policy"]
    two = sample(replace(config, out=str(tmp_path / "two"), add_special_tokens=True))
    assert (two.manifest["policy"]["start_ids"], two.start_id) == ([1, 1], 1)
    by_id = sample(replace(config, out=str(tmp_path / "id"), start_text=None, start_id=1))
    assert by_id.manifest == one.manifest
    assert [one.logprob for one in by_id.iter_samples()] != [one.logprob for one in two.iter_samples()]


# ---------------------------------------------------------------- min tokens


@pytest.mark.parametrize("n", [2000, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_no_sample_stops_before_the_minimum_and_many_stop_at_it(n: int):
    plain = replace(ENDING, max_tokens=24)
    params = replace(plain, min_tokens=9)
    drawn = small_model().draw(params, np.arange(n), num_slots=512)
    is_stop = np.isin(drawn.tokens, ENDING.stop_ids) & (np.arange(drawn.tokens.shape[1]) < drawn.lengths[:, None])
    assert not is_stop[:, :9].any()
    assert drawn.lengths.min() == 10  # the stop id is the tenth token
    assert (drawn.lengths == 10).sum() > n // 200
    shorter = small_model().draw(plain, np.arange(1000), num_slots=500)
    assert (shorter.lengths < 10).sum() > 50


def test_tokens_around_the_minimum_follow_the_exact_distribution():
    """Chi-square of the last token without and the first with stop ids; the level is 1e-4."""
    model, n = small_model(), 8192
    params = SamplingParams(start_ids=(1,), stop_ids=(5, 77, 123), min_tokens=1, max_tokens=2)
    drawn = model.draw(params, np.arange(n))
    first = log_softmax(model.logits(np.array([[1]], np.int32)))[0, -1]
    masked = np.where(np.isin(np.arange(len(first)), params.stop_ids), -np.inf, first)
    vocabulary = np.arange(SMALL_CONFIG.vocab_size)
    second = log_softmax(model.logits(np.stack([np.ones_like(vocabulary), vocabulary], axis=1).astype(np.int32))[:, -1])
    p_first = np.exp(log_softmax(masked))
    for tokens, p in ((drawn.tokens[:, 0], p_first), (drawn.tokens[:, 1], p_first @ np.exp(second))):
        assert not (p[tokens] == 0).any()
        expected = n * p
        order = np.argsort(-expected)
        cell = np.minimum(np.cumsum(expected[order]) // 20, n // 20 - 1).astype(int)
        observed = np.bincount(cell, np.bincount(tokens, minlength=len(p))[order])
        wanted = np.bincount(cell, expected[order])
        assert stats.chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > 1e-4
    stops = np.isin(drawn.tokens[:, 1], params.stop_ids)
    np.testing.assert_array_equal(drawn.stopped, stops)
    assert stops.any()


def test_log_probabilities_under_the_policy_are_those_of_transformers_with_the_same_mask(stories260k):
    torch = pytest.importorskip("torch", reason="the independent reference needs torch")
    from transformers import AutoModelForCausalLM
    from transformers.generation.logits_process import MinNewTokensLengthLogitsProcessor, TemperatureLogitsWarper

    model = load_model(stories260k, "data=1")
    params = SamplingParams(start_ids=(1,), stop_ids=(1, 2, 261), min_tokens=40, max_tokens=96, temperature=1.25)
    keys = per_sample_keys(0, np.arange(64))
    drawn = draw_samples(DecodeSpec.from_model(model), params, model.params, keys, num_slots=64)
    inputs = torch.from_numpy(with_start(params.start_ids, drawn.tokens[:, :-1])).long()
    processors = (
        MinNewTokensLengthLogitsProcessor(1, params.min_tokens, list(params.stop_ids), device="cpu"),
        TemperatureLogitsWarper(params.temperature),
    )
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(stories260k)(inputs).logits
    sums = np.zeros((2, 64))
    for step in range(params.max_tokens):
        plain = warped = logits[:, step]
        for processor in processors:
            warped = processor(inputs[:, : step + 1], warped)
        token = torch.from_numpy(drawn.tokens[:, step]).long()[:, None]
        alive = step < drawn.lengths
        for i, scores in enumerate((plain, warped)):
            sums[i] += np.where(alive, torch.log_softmax(scores, -1).gather(1, token)[:, 0].numpy(), 0)
    assert drawn.stopped.any()
    assert drawn.lengths.min() > params.min_tokens
    np.testing.assert_allclose(drawn.logprobs, sums[0], atol=1e-3)  # fp32 logits over up to 96 tokens
    np.testing.assert_allclose(drawn.policy_logprobs, sums[1], atol=1e-3)


def test_without_stop_ids_the_minimum_changes_nothing():
    plain = replace(ENDING, stop_ids=())
    first, second = (small_model().draw(params, np.arange(32)) for params in (plain, replace(plain, min_tokens=50)))
    for name in SAMPLE_FIELDS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
