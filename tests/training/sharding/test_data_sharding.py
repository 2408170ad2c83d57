"""Tests of `data` on several devices."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from corpus_factory import batch_indices, whole_mixture

from jax_selftrain.config import TrainConfig
from jax_selftrain.corpus import Mixture
from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.distributed.sharding import ShardingRules, make_sharding_rules
from jax_selftrain.training.data import load_batch

NAMES = ("tokens", "segments", "positions", "weights")


def sharding_rules_for(config: TrainConfig) -> ShardingRules:
    return make_sharding_rules("replicated", make_mesh(config.mesh), {})


@pytest.mark.parametrize("mesh", ["data=1", "data=2,model=2", "data=8"])
def test_a_batch_holds_the_rows_that_the_mixture_names(mesh: str, mixture: Mixture, options):
    config = options(mesh=mesh, batch_size=16, grad_accum=2)
    with mesh_context(make_mesh(mesh)):
        for n in (0, 1, 7):
            batch = load_batch(config, sharding_rules_for(config), mixture, n)
            source, row = mixture.batch(16, config.seed, n)
            for name, found in zip(NAMES, batch, strict=True):
                expected = [getattr(mixture.components[c], name)[r] for c, r in zip(source, row, strict=True)]
                np.testing.assert_array_equal(np.asarray(found).reshape(16, -1), expected)


def test_one_corpus_gives_the_batches_of_batch_indices(mixture: Mixture, options: Callable[..., TrainConfig]):
    config, rows = options(mesh="data=2", seed=3), mixture.components[0]
    with mesh_context(make_mesh("data=2")):
        for n in range(5):
            batch = load_batch(config, sharding_rules_for(config), whole_mixture(rows), n)
            for name, found in zip(NAMES, batch, strict=True):
                expected = getattr(rows, name)[batch_indices(len(rows), 8, 3, n)]
                np.testing.assert_array_equal(np.asarray(found)[0], expected)


class RecordedArray:
    """An array that records the rows of each read."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.reads: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        self.reads.append(np.ravel(rows).tolist())
        return self.array[rows]


def test_each_device_reads_its_own_rows_and_no_others(mixture: Mixture, options: Callable[..., TrainConfig]):
    """Each device reads by a call of its own."""
    config = options(mesh="data=4,model=2", batch_size=16)
    tokens = [RecordedArray(part.tokens) for part in mixture.components]
    parts = [dataclasses.replace(part, tokens=noted) for part, noted in zip(mixture.components, tokens, strict=True)]
    with mesh_context(make_mesh(config.mesh)):
        load_batch(config, sharding_rules_for(config), Mixture(tuple(parts), mixture.weights), 2)
    source, row = mixture.batch(16, config.seed, 2)
    for corpus, noted in enumerate(tokens):
        of_devices = [row[k : k + 4][source[k : k + 4] == corpus].tolist() for k in range(0, 16, 4)]
        assert sorted(set(map(tuple, noted.reads))) == sorted({tuple(rows) for rows in of_devices if rows})
