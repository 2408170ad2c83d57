"""Generation chooses as a full forward pass, for prompts of any length."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from jax_selftrain.errors import InputError
from jax_selftrain.hub import load_model
from jax_selftrain.sampling import SamplingParams, generate

LENGTHS = (1, 31, 32, 33, 64, 70, 5)  # around whole chunks of 32, the border of prefill and forced steps


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model("llama", max_position_embeddings=160), "data=1")


def prompts(lengths=LENGTHS):
    rng = np.random.default_rng(0)
    return [rng.integers(3, 512, n).tolist() for n in lengths]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0)


@pytest.mark.parametrize("mesh", ["data=1", pytest.param("data=2,model=2", marks=pytest.mark.nightly)])
def test_each_greedy_token_is_the_argmax_of_the_full_forward_pass(tiny_model, mesh):
    model = load_model(tiny_model("gpt_neox"), mesh)
    for prompt, generated in zip(prompts(), generate(model, prompts(), greedy(40), batch_size=2), strict=True):
        assert len(generated) == 40
        row = np.zeros((1, max(LENGTHS) + 40), np.int32)  # one shape: later tokens are masked
        row[0, : len(prompt) + 40] = prompt + generated
        logits = model.logits(row)[0, len(prompt) - 1 : len(prompt) + 39]
        chosen = np.take_along_axis(logits, np.array(generated)[:, None], axis=1)[:, 0]
        # Tolerance: fp32 noise between the two computations decides between closer logits.
        assert np.all(logits.max(axis=1) - chosen < 2e-5)


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


def test_sliding_windows_apply_to_prompts(tiny_model):
    folder = tiny_model("qwen2", use_sliding_window=True, sliding_window=24, max_window_layers=1)
    model = load_model(folder, "data=1")
    assert model.config.sliding_window is not None
    (prompt,) = prompts([80])
    (generated,) = generate(model, [prompt], greedy(20))
    logits = model.logits(np.array([prompt + generated]))[0, len(prompt) - 1 : -1]
    chosen = np.take_along_axis(logits, np.array(generated)[:, None], axis=1)[:, 0]
    assert np.all(logits.max(axis=1) - chosen < 2e-5)


def test_a_row_ends_at_the_first_stop_id_or_stop_criterion(model):
    whole = generate(model, prompts(), greedy(40))
    wanted = {row[9] for row in whole}
    cut = generate(model, prompts(), greedy(40), stop=lambda tokens: tokens[-1] in wanted)
    assert cut == generate(model, prompts(), replace(greedy(40), stop_ids=tuple(wanted)))
    for long, short in zip(whole, cut, strict=True):
        first = next(i for i, token in enumerate(long) if token in wanted)
        assert short == long[: first + 1]


def test_results_do_not_depend_on_the_batch(model):
    together = generate(model, prompts(), greedy(20), batch_size=4, batch_tokens=4 * 128)
    alone = [generate(model, [prompt], greedy(20), batch_size=4, batch_tokens=4 * 128)[0] for prompt in prompts()]
    assert together == alone


@pytest.mark.parametrize("n", [200, pytest.param(500, marks=pytest.mark.nightly)])
def test_draws_follow_the_distribution_and_depend_on_seed_and_request_id_alone(model, n):
    sampling_params = SamplingParams(max_tokens=1, temperature=0.7, top_k=4)
    (prompt,) = prompts([37])
    first = generate(model, [prompt] * n, sampling_params, seed=3, batch_size=n // 2)
    logits = np.sort(model.logits(np.array([prompt]))[0, -1].astype(np.float64))[::-1][:4]
    expected = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum() * n
    tokens, counts = np.unique([row[0] for row in first], return_counts=True)
    order = np.argsort(-model.logits(np.array([prompt]))[0, -1])[:4].tolist()
    found = np.zeros(4)
    found[[order.index(token) for token in tokens]] = counts
    assert stats.chisquare(found, expected).pvalue > 1e-3
    again = generate(model, [prompt] * 3, sampling_params, seed=3, request_ids=[7, n - 1, 0], batch_size=n // 2)
    assert again == [first[7], first[n - 1], first[0]]
    other = generate(model, [prompt] * (n // 2), sampling_params, seed=4, batch_size=n // 2)
    assert other != first[: n // 2]


def test_more_tokens_than_positions_are_refused(model):
    with pytest.raises(InputError, match="a prompt of 150 tokens and 11 more are longer than the model's 160"):
        generate(model, prompts([150, 3]), greedy(11))
    assert generate(model, [], greedy(5)) == []
