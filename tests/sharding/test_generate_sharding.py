"""Tests of `generate` on several devices."""

import numpy as np
import pytest

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


@pytest.mark.parametrize("mesh", [pytest.param("data=1", marks=pytest.mark.nightly), "data=2,model=2"])
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
