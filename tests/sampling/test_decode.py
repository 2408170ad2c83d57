"""The decode loop: distribution, log-probabilities, ends of samples, independent slots."""

import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_reference import ENDING, SAMPLE_FIELDS, SMALL_CONFIG, SmallModel, draw_samples
from scipy import stats

from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.distributed.sharding import make_sharding_rules, shard_host_array
from jax_selftrain.models import axis_sizes, init_params
from jax_selftrain.models.kv_cache import TAIL_LEN
from jax_selftrain.sampling.continuous_batching import RequestQueue, initial_state
from jax_selftrain.sampling.counter_rng import per_sample_keys
from jax_selftrain.sampling.decode import DecodeLoop, DecodeProgress, DecodeSpec, decode_chunks
from jax_selftrain.sampling.sampling_params import SamplingParams, warp_logits

PLAIN = SamplingParams(start_ids=(1,), stop_ids=(), max_tokens=2)
small_model = cache(SmallModel)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.fixture
def model() -> SmallModel:
    return small_model()


# ---------------------------------------------------------------- distribution


@pytest.mark.parametrize(
    "sharpness", [pytest.param(0.45, id="flat"), pytest.param(2.0, id="peaked", marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"top_k": 20}, marks=pytest.mark.nightly),
        pytest.param({"top_p": 0.8}, marks=pytest.mark.nightly),
        pytest.param({"min_p": 0.1}, marks=pytest.mark.nightly),
        {"temperature": 1.2, "top_k": 100, "top_p": 0.9, "min_p": 0.01},
    ],
    ids=str,
)
def test_first_and_second_tokens_follow_the_exact_distribution(sharpness, options):
    """Chi-square of first tokens and of pairs against the full forward pass.

    The seed is fixed; the level is 1e-4 per test. Cells are sorted by probability and merged until 20 samples are
    expected in each.
    """
    model, sampling_params, n = small_model(sharpness=sharpness), replace(PLAIN, **options), 4096
    drawn = model.draw(sampling_params, np.arange(n), seed=3)
    assert drawn.lengths.min() == 2

    def probabilities(tokens):
        masked = np.asarray(warp_logits(jnp.asarray(model.logits(tokens)[:, -1]), sampling_params))
        return np.exp(_log_softmax(masked))

    vocabulary = np.arange(SMALL_CONFIG.vocab_size)
    first = probabilities(np.array([[PLAIN.start_ids[0]]]))[0]
    second = probabilities(np.stack([np.full_like(vocabulary, PLAIN.start_ids[0]), vocabulary], axis=1))
    pairs = drawn.tokens[:, 0] * SMALL_CONFIG.vocab_size + drawn.tokens[:, 1]
    assert _chi_square(np.bincount(drawn.tokens[:, 0], minlength=SMALL_CONFIG.vocab_size), first) > 1e-4
    assert (
        _chi_square(np.bincount(pairs, minlength=SMALL_CONFIG.vocab_size**2), (first[:, None] * second).ravel()) > 1e-4
    )
    # The test can fail: it rejects half the logits.
    wrong = np.sqrt(first) / np.sqrt(first).sum()
    assert _chi_square(np.bincount(drawn.tokens[:, 0], minlength=SMALL_CONFIG.vocab_size), wrong) < 1e-4


def _chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    assert not counts[p == 0].any(), "an excluded token was drawn"
    order = np.argsort(-p)
    expected = (p * counts.sum())[order]
    cell = np.minimum(np.cumsum(expected) // 20, np.cumsum(expected)[-1] // 20 - 1).astype(int)
    observed, wanted = np.bincount(cell, counts[order]), np.bincount(cell, expected)
    return stats.chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue


# ---------------------------------------------------------------- log-probabilities and ends


@pytest.fixture(scope="module")
def drawn():
    return small_model().draw(ENDING, np.arange(64))


def test_log_probabilities_are_those_of_the_full_forward_pass(model, drawn):
    """They are at temperature 1 over the whole vocabulary for any parameters."""
    sharpened = model.draw(replace(ENDING, temperature=0.7, top_k=50, num_valid_ids=190), np.arange(64))
    for result in (drawn, sharpened):
        inputs = np.concatenate([np.full((64, 1), ENDING.start_ids[0]), result.tokens[:, :-1]], axis=1)
        logprobs = np.take_along_axis(_log_softmax(model.logits(inputs)), result.tokens[:, :, None], axis=2)[:, :, 0]
        counted = np.arange(result.tokens.shape[1]) < result.lengths[:, None]
        # fp32: about 1e-6 of noise per logit, and sums of up to 70 terms.
        np.testing.assert_allclose(result.logprobs, (logprobs * counted).sum(axis=1), atol=1e-4)


def test_samples_end_at_a_stop_id_or_at_the_length_limit(drawn):
    assert 0.3 < drawn.stopped.mean() < 0.9
    for tokens, length, stopped in zip(drawn.tokens, drawn.lengths, drawn.stopped, strict=True):
        stops = np.isin(tokens[:length], ENDING.stop_ids)
        assert stopped == stops[-1]
        assert not stops[:-1].any()
        assert stopped or length == ENDING.max_tokens
        assert not tokens[length:].any()


def test_a_stop_id_at_the_length_limit_counts_as_a_stop(model, drawn):
    row = np.flatnonzero(drawn.stopped & (drawn.lengths > 3) & (drawn.lengths < TAIL_LEN))[0]
    length = int(drawn.lengths[row])
    cut = model.draw(replace(ENDING, max_tokens=length), np.arange(64))
    assert cut.stopped[row]
    assert cut.lengths[row] == length


def test_a_lower_length_limit_truncates_the_same_samples(model, drawn):
    for limit in (1, TAIL_LEN, 2 * TAIL_LEN):
        cut = model.draw(replace(ENDING, max_tokens=limit), np.arange(64))
        np.testing.assert_array_equal(cut.tokens, drawn.tokens[:, :limit])
        np.testing.assert_array_equal(cut.lengths, np.minimum(drawn.lengths, limit))


def test_without_stop_ids_every_sample_reaches_the_limit(model, drawn):
    endless = model.draw(replace(ENDING, stop_ids=()), np.arange(64))
    assert (endless.lengths == ENDING.max_tokens).all()
    assert not endless.stopped.any()
    for row in range(64):
        np.testing.assert_array_equal(
            endless.tokens[row, : drawn.lengths[row]], drawn.tokens[row, : drawn.lengths[row]]
        )


def test_padding_ids_are_never_drawn(model):
    tokens = model.draw(
        SamplingParams(start_ids=(1,), stop_ids=(), max_tokens=64, num_valid_ids=20), np.arange(64)
    ).tokens
    assert tokens.max() == 19


# ---------------------------------------------------------------- slots


def test_a_sample_is_bitwise_the_same_in_any_slot_with_any_neighbors(model, drawn):
    order = np.random.default_rng(0).permutation(64)
    shuffled = model.draw(ENDING, order)
    others = model.draw(ENDING, np.where(np.arange(64) % 2, 1000 + np.arange(64), np.arange(64)))
    for name in SAMPLE_FIELDS:
        np.testing.assert_array_equal(getattr(shuffled, name), getattr(drawn, name)[order])
        np.testing.assert_array_equal(getattr(others, name)[::2], getattr(drawn, name)[::2])


@pytest.mark.parametrize("queue_size", [8, 11, 64])
def test_idle_slots_and_queue_entries_change_nothing(model, drawn, queue_size):
    """Fewer samples than slots or than queue entries."""
    few = model.draw(ENDING, np.arange(8), num_slots=64, queue_size=queue_size)
    for name in SAMPLE_FIELDS:
        np.testing.assert_array_equal(getattr(few, name), getattr(drawn, name)[:8])


def test_a_progress_callback_may_end_the_loop(model):
    reports: list[DecodeProgress] = []
    drawn = model.draw(ENDING, np.arange(64), num_slots=16, progress_callback=reports.append)
    for name in ("num_finished", "tokens", "slot_steps"):
        assert [getattr(progress, name) for progress in reports] == sorted(
            getattr(progress, name) for progress in reports
        )
    assert reports[-1] == DecodeProgress(64, int(drawn.lengths.sum()), drawn.slot_steps)
    assert len(reports) > 2

    def stop(progress: DecodeProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.draw(ENDING, np.arange(64), num_slots=16, progress_callback=stop)


def test_policy_log_probabilities_are_those_of_the_warped_logits(model):
    """They are log-probabilities of the warped logits."""
    plain = model.draw(ENDING, np.arange(64))
    np.testing.assert_allclose(plain.policy_logprobs, plain.logprobs, atol=1e-4)
    sampling_params = replace(ENDING, temperature=0.7, top_k=50, num_valid_ids=190)
    drawn = model.draw(sampling_params, np.arange(64))
    inputs = np.concatenate([np.full((64, 1), ENDING.start_ids[0]), drawn.tokens[:, :-1]], axis=1)
    masked = np.asarray(
        warp_logits(jnp.asarray(model.logits(inputs).reshape(-1, SMALL_CONFIG.vocab_size)), sampling_params)
    )
    logprobs = _log_softmax(masked).reshape(64, -1, SMALL_CONFIG.vocab_size)
    logprobs = np.take_along_axis(logprobs, drawn.tokens[:, :, None], axis=2)[:, :, 0]
    counted = np.arange(drawn.tokens.shape[1]) < drawn.lengths[:, None]
    expected = np.where(counted, logprobs, 0).sum(axis=1)
    np.testing.assert_allclose(drawn.policy_logprobs, expected, atol=1e-4)


def test_another_seed_gives_other_samples(model, drawn):
    other = model.draw(ENDING, np.arange(64), seed=1)
    assert (other.tokens[:, 0] != drawn.tokens[:, 0]).mean() > 0.8


def test_nan_logits_are_reported(drawn):
    broken = SmallModel()
    kernel = np.asarray(broken.params["head"]["kernel"]).copy()
    kernel[150, 3] = np.nan
    broken.params["head"]["kernel"] = jax.device_put(kernel, broken.params["head"]["kernel"].sharding)
    assert not broken.draw(ENDING, np.arange(64)).finite.any()
    assert drawn.finite.all()


# ---------------------------------------------------------------- the compiled program


def _compiled_text(layers: int = 2, rows: int = 16, tokens: int = 256) -> str:
    config = replace(SMALL_CONFIG, num_layers=layers)
    rules = make_sharding_rules("tensor", make_mesh("data=1,model=1"), axis_sizes(config))
    spec, sampling_params = DecodeSpec(config, rules, "float32"), replace(ENDING, max_tokens=tokens)
    keys, count = np.zeros((rows, 2), np.uint32), np.array([rows], np.int32)
    queue = RequestQueue(shard_host_array(rules, keys, ("batch", None)), shard_host_array(rules, count, ("batch",)))
    params = init_params(config, 0, rules)
    with mesh_context(rules.mesh):
        cache = jax.eval_shape(partial(spec.init_cache, rows, sampling_params.output_len))
        state = jax.eval_shape(partial(initial_state, rules, sampling_params, rows), queue, cache)
        run = jax.jit(partial(decode_chunks, spec, sampling_params), donate_argnums=(2,))
        return run.lower(params, queue, state, jnp.int32(1)).compile().as_text()


def _sizes(text: str, operations: str) -> list[int]:
    """Return the number of elements of each result of the operations."""
    found = re.findall(rf"= \w+\[([\d,]+)\]\S* (?:{operations})\(", text)
    return [int(np.prod([int(n) for n in shape.split(",")])) for shape in found]


def test_no_step_copies_the_cache():
    """No copy has the size of a layer's committed blocks."""
    text = _compiled_text()
    one_layer = 16 * 256 * SMALL_CONFIG.num_kv_heads * SMALL_CONFIG.head_dim
    assert max(_sizes(text, "dynamic-update-slice")) == 2 * one_layer, "committed blocks are updated in place"
    assert max(_sizes(text, "copy|transpose|concatenate|gather")) < one_layer
    assert max(_sizes(text, "dynamic-slice")) == one_layer // 2, "a block is half of 256 positions"


def test_the_program_does_not_grow_with_depth_or_length():
    texts = [_compiled_text(*sizes) for sizes in ((12,), (48, 16, 2048))]
    small, large = (len(re.findall(r"^ +(?:ROOT )?\S+ = ", text, re.MULTILINE)) for text in texts)  # not stack frames
    assert 1000 < large <= 1.02 * small


def test_a_loop_reuses_its_cache_and_its_programs(model):
    """A second call compiles nothing and ignores old contents of the cache."""
    drawn = model.draw(ENDING, np.arange(64), num_slots=16)
    loop = DecodeLoop(model.spec, ENDING, model.params, num_slots=16, queue_size=64)
    loop.generate(per_sample_keys(5, np.arange(64)))
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    try:
        again = loop.generate(per_sample_keys(0, np.arange(64)))
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [event for event in compiled if "compile" in event]
    for name in SAMPLE_FIELDS:
        np.testing.assert_array_equal(getattr(again, name), getattr(drawn, name))


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_a_cache_in_fewer_bits_gives_nearly_the_same_log_probabilities(model, drawn, cache_dtype):
    """The first chunk is exact."""
    spec = replace(model.spec, cache_dtype=cache_dtype)
    found = draw_samples(spec, ENDING, model.params, per_sample_keys(0, np.arange(64)), num_slots=64)
    np.testing.assert_array_equal(found.tokens[:, :TAIL_LEN], drawn.tokens[:, :TAIL_LEN])
    inputs = np.concatenate([np.full((64, 1), ENDING.start_ids[0]), found.tokens[:, :-1]], axis=1)
    logprobs = np.take_along_axis(_log_softmax(model.logits(inputs)), found.tokens[:, :, None], axis=2)[:, :, 0]
    exact = np.where(np.arange(found.tokens.shape[1]) < found.lengths[:, None], logprobs, 0).sum(axis=1)
    error = np.abs(found.logprobs - exact) / found.lengths
    assert 1e-6 < error.max() < 0.05
