"""Tests of `engine` on several devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scoring_requests import BATCH, CONFIG, load_with_positions, questions, random_requests, tokenize_all

from jax_selftrain import hub
from jax_selftrain.config import ScoreConfig
from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.distributed.sharding import make_sharding_rules, shard_host_array
from jax_selftrain.likelihood import LoglikelihoodRequest, loglikelihoods, scoring_program
from jax_selftrain.likelihood.batching import (
    MAX_UNIQUE_TOKENS,
    plan_units,
)
from jax_selftrain.likelihood.device_programs import logprobs_and_argmax
from jax_selftrain.likelihood.engine import deduplicate
from jax_selftrain.models import axis_sizes


@pytest.fixture(scope="module")
def load(tiny_model):
    return partial(load_with_positions, tiny_model)


@pytest.mark.parametrize(
    ("mesh", "preset"),
    [
        pytest.param("data=4", "tensor", marks=pytest.mark.nightly),
        pytest.param("data=2,model=2", "tensor", marks=pytest.mark.nightly),
        pytest.param("model=2", "replicated", marks=pytest.mark.nightly),
        ("data=2,model=2", "fsdp"),
    ],
)
def test_any_mesh_gives_the_same_likelihoods(load, mesh, preset):
    requests = random_requests(40, 512, 64)
    assert_equal_scores(load("llama", mesh, preset), load(), requests)


def assert_equal_scores(model, reference, requests):
    """Compare the requests, each of their tokens, and the most probable tokens."""
    tokens = [
        LoglikelihoodRequest([*context, *continuation[:i]], [continuation[i]])
        for context, continuation in requests
        for i in range(len(continuation))
    ]
    whole = [*requests, *tokens]
    found, expected = (loglikelihoods(one, whole, batch_tokens=BATCH, token_scores=True) for one in (model, reference))
    for a, b in zip(found, expected, strict=True):
        for values, known in zip(a.token_scores, b.token_scores, strict=True):
            np.testing.assert_allclose(values, known, atol=2e-5)
        assert a.loglikelihood == pytest.approx(b.loglikelihood, abs=2e-5 * a.tokens)  # fp32 logits are right to 1e-6
        assert (a.is_greedy, a.tokens) == (b.is_greedy, b.tokens)
    padded = np.zeros((len(tokens), 64), np.int32)  # later tokens are masked
    for row, (context, _) in zip(padded, tokens, strict=True):
        row[: len(context)] = context
    best = np.asarray(reference.logits(padded)).argmax(-1)
    greedy = [(context, [int(row[len(context) - 1])]) for row, (context, _) in zip(best, tokens, strict=True)]
    assert all(answer.is_greedy for answer in loglikelihoods(model, greedy, batch_tokens=BATCH))


@pytest.mark.parametrize(
    ("family", "mesh", "overrides"),
    [
        ("gpt_neox", "data=1", {}),
        ("llama", "data=2,model=2", {}),
        ("qwen2", "data=1", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}),
    ],
)
def test_choices_of_a_question_are_scored_as_if_each_were_alone(tiny_model, family, mesh, overrides):
    model = hub.load_model(tiny_model(family, max_position_embeddings=128, **overrides), mesh)
    requests, greedy = questions(6), []
    for request, answer in zip(requests, loglikelihoods(model, requests, batch_tokens=BATCH), strict=True):
        n, end = len(request.continuation), len(request.context) + len(request.continuation) - 1
        whole = np.zeros((model.sharding_rules.data_parallelism, 64), np.int32)  # one shape: later tokens are masked
        whole[0, : end + 1] = [*request.context, *request.continuation]
        logits = np.asarray(model.logits(whole))[0, end - n : end]
        targets = whole[0, end - n + 1 : end + 1]
        expected = np.asarray(jax.nn.log_softmax(logits), np.float64)[np.arange(n), targets].sum()
        assert answer.loglikelihood == pytest.approx(expected, abs=2e-5)  # rounding noise of fp32 logits is about 1e-6
        best = logits.argmax(-1).tolist()
        assert answer.is_greedy == (best == targets.tolist())
        greedy += [([*request.context, *request.continuation[:i]], [token]) for i, token in enumerate(best)]
    assert all(answer.is_greedy for answer in loglikelihoods(model, greedy, batch_tokens=BATCH))


def test_a_unit_lists_the_unique_tokens_of_each_device():
    rules = make_sharding_rules("tensor", make_mesh("data=2"), axis_sizes(CONFIG))
    requests = [(request.context, request.continuation[:1]) for request in random_requests(250, 50_000, 500)]
    units = plan_units(rules, CONFIG, tokenize_all(requests), BATCH)
    assert len(units) > 2
    for unit in units:
        own = [[], []]
        for batch in unit.batches:
            for number, row in enumerate(batch.rows):
                own[number // batch.rows_per_device].append(row.tokens)
        for vocabulary, rows in zip(unit.unique_tokens, own, strict=True):
            np.testing.assert_array_equal(vocabulary, np.unique(np.concatenate(rows)))
    sizes = [max(map(len, unit.unique_tokens)) for unit in units]
    assert MAX_UNIQUE_TOKENS - BATCH < max(sizes) <= MAX_UNIQUE_TOKENS


@pytest.mark.parametrize("spec", ["data=1", pytest.param("data=2,model=2", marks=pytest.mark.nightly)])
def test_a_batch_with_too_many_unique_tokens_is_a_unit_alone(load, monkeypatch, spec):
    requests = random_requests(40, 512, 300)
    expected = loglikelihoods(load(), requests, batch_tokens=BATCH)
    monkeypatch.setattr("jax_selftrain.likelihood.batching.MAX_UNIQUE_TOKENS", 128)
    model = load(mesh=spec)
    units = plan_units(model.sharding_rules, model.config, deduplicate(model.config, requests)[0], BATCH)
    assert {len(unit.batches) for unit in units} == {1}
    assert max(len(unit.unique_tokens[0]) for unit in units) > 128
    for a, b in zip(loglikelihoods(model, requests, batch_tokens=BATCH), expected, strict=True):
        assert a.loglikelihood == pytest.approx(b.loglikelihood, abs=2e-5 * a.tokens)
        assert a.is_greedy == b.is_greedy


@pytest.mark.parametrize(("mesh", "preset"), [("data=1", "tensor"), ("model=2", "tensor"), ("model=2", "replicated")])
def test_the_argmax_of_equal_logits_is_the_lowest_id_and_large_logits_stay_finite(load, mesh, preset):
    rules = load("llama", mesh, preset).sharding_rules
    values = [[0.0, 5.0, 5.0, -jnp.inf, 1.0, 5.0, 5.0, 2.0], [3e4, -3e4, 0.0, 3e4, 3e4, 0.0, -3e4, 3e4]]
    targets = [[2, 0, 7], [1, 0, 4]]
    with mesh_context(rules.mesh):
        logits = shard_host_array(rules, np.array([values], np.float32), ("batch", None, "vocab"))
        wanted = shard_host_array(rules, np.array([targets], np.int32), ("batch", None, None))
        logprobs, best = jax.jit(logprobs_and_argmax)(logits, wanted)
    assert best.tolist() == [[1, 0]]
    expected = jax.nn.log_softmax(jnp.array(values))[jnp.array([[0], [1]]), jnp.array(targets)]
    np.testing.assert_allclose(np.asarray(logprobs)[0], expected, rtol=1e-6)


def test_the_program_compiles_without_weights_and_never_holds_all_logits(tiny_model):
    vocab = 8192  # large enough that logits would dwarf everything else
    folder = tiny_model("llama", vocab_size=vocab, max_position_embeddings=128, tokenizer=False)
    config = ScoreConfig(model=str(folder), batch_tokens=8192)
    mesh = make_mesh("data=2,model=2")
    function, arguments, donated = scoring_program(config, mesh)
    with mesh_context(mesh):
        compiled = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
    all_logits = 4 * config.batch_tokens * vocab // 4  # bytes on each of the four devices
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < all_logits / 2


def test_the_engine_runs_the_program_that_it_plans(load):
    model = load("llama", "data=2")
    config = ScoreConfig(model=model.source.ref, batch_tokens=BATCH)
    function, arguments, _ = scoring_program(config, model.sharding_rules.mesh)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), arguments[0])
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.params)
    assert make_sharding_rules("tensor", model.sharding_rules.mesh, axis_sizes(model.config)) == model.sharding_rules
    with mesh_context(model.sharding_rules.mesh):
        logprobs, greedy = jax.eval_shape(function, *arguments)
    *_, targets, _ = arguments
    assert (logprobs.shape, greedy.shape) == (targets.shape, targets.shape[:2])
