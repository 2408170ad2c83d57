"""Greedy continuation: what a full forward pass would choose, token by token."""

import numpy as np
import pytest

from jax_selftrain.errors import InputError
from jax_selftrain.hub import load_model
from jax_selftrain.sampling import greedy_continue


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model("gpt_neox"), "data=1,model=1")


def _prefixes(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 512, (rows, length), dtype=np.int32)


@pytest.mark.parametrize(("prefix", "n"), [(32, 40), (1, 8), (40, 1)])
def test_each_token_is_the_most_probable_after_all_before_it(model, prefix, n):
    """40 forced tokens cross a page; 32 + 40 outgrow the first cache."""
    tokens = _prefixes(6, prefix)
    continued = greedy_continue(model, tokens, n, batch_size=8)
    assert continued.shape == (6, n)
    whole = np.concatenate([tokens, continued], axis=1)
    logits = model.logits(whole[:, :-1])[:, prefix - 1 :]
    chosen = np.take_along_axis(logits, continued[:, :, None], axis=2)[:, :, 0]
    # Where two logits are this close, fp32 noise between the two ways of computing them may decide.
    assert np.all(logits.max(axis=2) - chosen < 2e-5)
    assert (logits.argmax(axis=2) == continued).mean() > 0.999


def test_rows_are_continued_alike_in_batches_of_one_shape(model):
    tokens = _prefixes(19, 1)
    whole = greedy_continue(model, tokens, 8, batch_size=8)
    np.testing.assert_array_equal(greedy_continue(model, tokens[3:7], 8, batch_size=8), whole[3:7])
    assert greedy_continue(model, tokens[:0], 8).shape == (0, 8)


def test_greedy_text_is_that_of_transformers(stories260k):
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    from transformers import AutoModelForCausalLM

    model = load_model(stories260k, "data=2,model=2")
    prefix = np.array([[1], [1]], np.int32)
    reference = AutoModelForCausalLM.from_pretrained(stories260k)
    expected = reference.generate(torch.from_numpy(prefix[:1]).long(), max_new_tokens=60, do_sample=False)
    got = greedy_continue(model, prefix, 60, batch_size=1)
    np.testing.assert_array_equal(got, np.tile(expected.numpy()[:, 1:], (2, 1)))
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    assert model.tokenizer.decode(got[0]).startswith(text)


def test_more_tokens_than_the_model_has_positions_are_refused(model):
    with pytest.raises(InputError, match="a prefix of 1000 and a suffix of 25 tokens are longer than the model's 1024"):
        greedy_continue(model, _prefixes(1, 1000), 25)
