"""Continuing prompts of different lengths: what a full forward pass would choose, until a condition holds."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from jax_selftrain.errors import InputError
from jax_selftrain.hub import load_model
from jax_selftrain.sampling import SamplingParams, generate

LENGTHS = (1, 31, 32, 33, 64, 70, 5)  # around whole pages of 32, where prefill and forced steps meet


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model("llama", max_position_embeddings=160), "data=1")


def prompts(lengths=LENGTHS):
    rng = np.random.default_rng(0)
    return [rng.integers(3, 512, n).tolist() for n in lengths]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0)


@pytest.mark.parametrize("mesh", [pytest.param("data=1", marks=pytest.mark.slow), "data=2,model=2"])
def test_each_token_is_the_most_probable_after_all_before_it(tiny_model, mesh):
    model = load_model(tiny_model("gpt_neox"), mesh)
    for prompt, written in zip(prompts(), generate(model, prompts(), greedy(40), batch_size=2), strict=True):
        assert len(written) == 40
        logits = model.logits(np.array([prompt + written]))[0, len(prompt) - 1 : -1]
        chosen = np.take_along_axis(logits, np.array(written)[:, None], axis=1)[:, 0]
        # Where two logits are this close, fp32 noise between the two ways of computing them may decide.
        assert np.all(logits.max(axis=1) - chosen < 2e-5)


def test_sliding_windows_hold_in_prompts_too(tiny_model):
    folder = tiny_model("qwen2", use_sliding_window=True, sliding_window=24, max_window_layers=1)
    model = load_model(folder, "data=1")
    assert model.config.sliding_window is not None
    (prompt,) = prompts([80])
    (written,) = generate(model, [prompt], greedy(20))
    logits = model.logits(np.array([prompt + written]))[0, len(prompt) - 1 : -1]
    chosen = np.take_along_axis(logits, np.array(written)[:, None], axis=1)[:, 0]
    assert np.all(logits.max(axis=1) - chosen < 2e-5)


def test_a_row_ends_where_the_condition_first_holds(model):
    whole = generate(model, prompts(), greedy(40))
    wanted = {row[9] for row in whole}
    cut = generate(model, prompts(), greedy(40), stop=lambda tokens: tokens[-1] in wanted)
    assert cut == generate(model, prompts(), replace(greedy(40), stop_ids=tuple(wanted)))
    for long, short in zip(whole, cut, strict=True):
        first = next(i for i, token in enumerate(long) if token in wanted)
        assert short == long[: first + 1]


def test_neighbors_and_batches_do_not_matter(model):
    together = generate(model, prompts(), greedy(20), batch_size=4, batch_tokens=4 * 128)
    alone = [generate(model, [prompt], greedy(20), batch_size=4, batch_tokens=4 * 128)[0] for prompt in prompts()]
    assert together == alone


@pytest.mark.slow
def test_draws_follow_the_policy_and_depend_on_seed_and_number_alone(model):
    sampling_params = SamplingParams(max_tokens=1, temperature=0.7, top_k=4)
    (prompt,) = prompts([37])
    n = 2000
    first = generate(model, [prompt] * n, sampling_params, seed=3, batch_size=250)
    logits = np.sort(model.logits(np.array([prompt]))[0, -1].astype(np.float64))[::-1][:4]
    expected = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum() * n
    tokens, counts = np.unique([row[0] for row in first], return_counts=True)
    order = np.argsort(-model.logits(np.array([prompt]))[0, -1])[:4].tolist()
    found = np.zeros(4)
    found[[order.index(token) for token in tokens]] = counts
    assert stats.chisquare(found, expected).pvalue > 1e-3
    again = generate(model, [prompt] * 3, sampling_params, seed=3, request_ids=[7, 1999, 0], batch_size=250)
    assert again == [first[7], first[1999], first[0]]
    other = generate(model, [prompt] * 250, sampling_params, seed=4, batch_size=250)
    assert other != first[:250]


def test_more_tokens_than_the_model_has_positions_are_refused(model):
    with pytest.raises(InputError, match="a prompt of 150 tokens and 11 more are longer than the model's 160"):
        generate(model, prompts([150, 3]), greedy(11))
    assert generate(model, [], greedy(5)) == []


def test_greedy_text_is_that_of_transformers(stories260k):
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    from transformers import AutoModelForCausalLM

    model = load_model(stories260k, "data=2,model=2")
    reference = AutoModelForCausalLM.from_pretrained(stories260k)
    expected = reference.generate(torch.tensor([[1]]), max_new_tokens=60, do_sample=False)[0, 1:].tolist()
    tokens, again = generate(model, [[1], [1]], greedy(60), batch_size=1)
    assert tokens == again == expected
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    assert model.tokenizer.decode(tokens).startswith(text)
