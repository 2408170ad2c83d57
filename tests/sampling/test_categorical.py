"""The token draw is exact and diverges at rounding ties only."""

import jax.numpy as jnp
import numpy as np
import pytest
from sampling_reference import (
    draw,
    draw_with_logsumexp,
    draw_with_margins,
    first_bits,
    random_logits,
    tree_path,
)
from scipy import special, stats

from jax_selftrain.sampling.categorical import level_sizes


@pytest.mark.parametrize("vocab_size", [5, 512, 50304])
def test_a_draw_returns_the_logsumexp_of_its_logits(vocab_size):
    logits, words = random_logits(64, vocab_size, 3.0), first_bits(64, vocab_size)
    expected = special.logsumexp(logits.astype(np.float64), axis=1)
    np.testing.assert_allclose(draw_with_logsumexp(logits, words)[1], expected, rtol=1e-6)
    for value in (np.nan, np.inf):
        logits[3, 2] = value
        assert np.isfinite(draw_with_logsumexp(logits, words)[1]).tolist() == [row != 3 for row in range(64)]


@pytest.mark.parametrize(
    ("vocab_size", "widths"),
    [(1, (1,)), (16, (1,)), (17, (1, 2)), (256, (1, 16)), (512, (1, 2, 32)), (50304, (1, 13, 197, 3144))],
)
def test_level_sizes_cover_the_vocabulary(vocab_size, widths):
    assert level_sizes(vocab_size) == widths


@pytest.mark.parametrize("scale", [0.3, 3.0], ids=["flat", "peaked"])
def test_a_million_draws_follow_the_distribution(scale):
    """Chi-square over all tokens, with fixed seed and level 1e-4."""
    vocab_size, rows, rounds = 300, 20_000, 50
    logits = random_logits(1, vocab_size, scale)[0]
    counts = np.zeros(vocab_size)
    for seed in range(rounds):
        tokens = draw(jnp.tile(logits, (rows, 1)), first_bits(rows, vocab_size, seed))
        counts += np.bincount(np.asarray(tokens), minlength=vocab_size)
    p = np.exp(logits.astype(np.float64))
    expected = rows * rounds * p / p.sum()
    rare = expected < 10  # pool rare tokens: chi-square requires filled cells
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if not rare.any():
        observed, expected = observed[:-1], expected[:-1]
    assert stats.chisquare(observed, expected).pvalue > 1e-4
    # The test can fail: the same counts reject another temperature.
    wrong = np.exp(logits.astype(np.float64) / (1.01 if scale > 1 else 1.05))
    wrong = np.append(wrong[~rare], wrong[rare].sum()) if rare.any() else wrong
    assert stats.chisquare(observed, wrong / wrong.sum() * observed.sum()).pvalue < 1e-4


@pytest.mark.parametrize("vocab_size", [1, 5, 16, 17, 300, 512, 4097, 50304])
def test_the_draw_equals_the_draw_in_fp64_except_at_ties(vocab_size):
    rows = 2000 if vocab_size < 5000 else 200
    logits, words = random_logits(rows, vocab_size, 2.0), first_bits(rows, vocab_size)
    tokens = np.asarray(draw(logits, words))
    expected, margins = draw_with_margins(logits, words)
    diverged = tokens != expected
    # fp32: a boundary is two sums of ≤ 16 + 4·levels roundings, each of at most 2⁻²⁴ relative.
    assert np.all(margins[diverged].min(axis=1, initial=np.inf) < 32 * 2.0**-24)
    assert diverged.mean() < 1e-3


def test_paths_run_from_the_root_to_the_token():
    vocab_size = 5000
    tokens = np.arange(vocab_size)
    path = tree_path(tokens, vocab_size)
    widths = level_sizes(vocab_size)
    np.testing.assert_array_equal(path[:, -1], tokens)
    for level in range(1, len(widths)):
        np.testing.assert_array_equal(path[:, level] % widths[level], path[:, level - 1])
    assert path[:, 0].max() < 16


@pytest.mark.parametrize("word", [0, 0xFF, 0x7FFFFFFF, 0xFFFFFF00, 0xFFFFFFFF])
def test_excluded_tokens_are_never_drawn(word):
    """The words include both ends of the range of the uniform number."""
    vocab_size = 300
    logits = random_logits(400, vocab_size, 2.0)
    allowed = np.random.default_rng(1).random(logits.shape) < np.linspace(0.003, 0.5, 400)[:, None]
    allowed[np.arange(400), np.random.default_rng(2).integers(0, vocab_size, 400)] = True
    words = np.full((400, len(level_sizes(vocab_size))), word, np.uint32)
    tokens = np.asarray(draw(jnp.where(allowed, logits, -jnp.inf), words))
    assert allowed[np.arange(400), tokens].all()


def test_the_only_allowed_token_is_drawn():
    vocab_size = 300
    logits = np.full((vocab_size, vocab_size), -np.inf, np.float32)
    np.fill_diagonal(logits, np.linspace(-1e30, 1e30, vocab_size))
    np.testing.assert_array_equal(draw(logits, first_bits(vocab_size, vocab_size)), np.arange(vocab_size))


def test_a_row_does_not_depend_on_its_neighbors():
    logits, words = random_logits(50, 700, 3.0), first_bits(50, 700)
    together = np.asarray(draw(logits, words))
    order = np.random.default_rng(0).permutation(50)
    np.testing.assert_array_equal(draw(logits[order], words[order]), together[order])
    np.testing.assert_array_equal(draw(logits[7:8], words[7:8]), together[7:8])


def test_noisy_logits_diverge_only_within_the_stated_margin():
    """Noise a hundred times that of meshes gives enough divergences."""
    vocab_size, rows, noise = 512, 20_000, 5e-4
    logits, words = random_logits(rows, vocab_size, 2.0), first_bits(rows, vocab_size)
    noisy = logits + np.random.default_rng(3).uniform(-noise, noise, logits.shape).astype(np.float32)
    before, after = (np.asarray(draw(x, words)) for x in (logits, noisy))
    exact, margins = draw_with_margins(logits, words)
    paths = [tree_path(tokens, vocab_size) for tokens in (exact, before, after)]
    diverged = np.flatnonzero(before != after)
    # Each of at most 15 boundaries on 3 levels moves by at most noise / 2 (observed: 1.2e-3, a tenth of that).
    assert 0 < len(diverged) < rows * 3 * 15 * noise / 2
    for row in diverged:
        level = np.argmax((paths[1][row] != paths[0][row]) | (paths[2][row] != paths[0][row]))
        assert margins[row, level] < noise / 2 + 32 * 2.0**-24


def test_too_few_random_words_are_refused():
    with pytest.raises(ValueError, match="2 random words for a tree of 3 levels"):
        draw(jnp.zeros((1, 512)), jnp.zeros((1, 2), jnp.uint32))
