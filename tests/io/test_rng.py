"""Random streams depend on their key alone and are independent."""

from __future__ import annotations

import numpy as np

from jax_selftrain.io.rng import make_rng, random_permutation


def test_a_stream_is_the_same_in_every_process_and_numpy_version():
    words = make_rng("test", 1, "layers/mlp").bit_generator.random_raw(2)
    assert [f"{word:016x}" for word in words.tolist()] == ["2b6b26a14fc0724b", "1b9b3952fa8f34cf"]


def test_every_part_of_the_key_changes_the_stream():
    keys = [("a", 1), ("b", 1), ("a", 2), ("a", "1"), ("a", 1, 0), ("a", 1, 1), ("a 1",), ("a", -1), ("a", 2**70)]
    first = {int(make_rng(*key).bit_generator.random_raw()) for key in keys}
    assert len(first) == len(keys)


def test_streams_of_neighboring_keys_are_uncorrelated():
    draws = np.stack([make_rng("test", 7, i).standard_normal(10_000) for i in range(20)])
    correlations = np.corrcoef(draws)[np.triu_indices(20, 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(10_000)  # five standard errors of independent draws


def test_a_permutation_holds_every_item_once_and_moves_with_the_key():
    orders = [random_permutation(make_rng("test", seed), 100) for seed in range(3)]
    assert all(sorted(order.tolist()) == list(range(100)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 3
    assert random_permutation(make_rng("test", 0), 0).shape == (0,)
