"""Batches on the mesh, a function of (rows, shares, seed, index)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import jax
import numpy as np

from jax_selftrain.config import TrainConfig
from jax_selftrain.corpus import Mixture, PackedRows
from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.training.loss import Batch


def load_batch(config: TrainConfig, rules: ShardingRules, rows: PackedRows | Mixture, n: int) -> Batch:
    """Load batch n onto the mesh, `[grad_accum, batch_size / grad_accum, …]`.

    Each process reads only the rows of its own devices from the memory-mapped corpora. Rows of a small corpus repeat
    within a batch, in the order of its next epoch.

    With `random_loss_sign`, the weights of each document in a row are multiplied by +1 or −1. The sign is a function of
    (seed, corpus, row, document): it is the same in every epoch.

    Args:
      config: the run's options.
      rules: the mesh.
      rows: one corpus, or several with their shares.
      n: index of the batch.
    """
    mixture = rows if isinstance(rows, Mixture) else Mixture((rows,), (Fraction(1),))
    parts = mixture.components
    weights: list[np.ndarray | _SignFlippedRows] = [part.weights for part in parts]
    if config.random_loss_sign:
        weights = [_flip_signs(part, config.seed, corpus) for corpus, part in enumerate(parts)]
    corpus_ids, row_ids = (
        ids.reshape(config.grad_accum, -1) for ids in mixture.batch(config.batch_size, config.seed, n)
    )
    sharding = rules.sharding((None, "batch", None))

    def load(arrays: Sequence[np.ndarray | _SignFlippedRows]) -> jax.Array:
        length = arrays[0].shape[1]

        def read(index: Any) -> np.ndarray:
            corpora, rows = corpus_ids[index[:2]], row_ids[index[:2]]
            values = np.empty((*rows.shape, length), arrays[0].dtype)
            for corpus in np.unique(corpora).tolist():
                values[corpora == corpus] = arrays[corpus][rows[corpora == corpus]]
            return values[..., index[2]]

        return jax.make_array_from_callback((*row_ids.shape, length), sharding, read)

    return Batch(
        load([part.tokens for part in parts]),
        load([part.segments for part in parts]),
        load([part.positions for part in parts]),
        load(weights),
    )


@dataclass(frozen=True)
class _SignFlippedRows:
    """Weights of rows with a random sign for each document."""

    rows: PackedRows
    key: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows.weights.shape

    @property
    def dtype(self) -> np.dtype:
        return self.rows.weights.dtype

    def __getitem__(self, row: np.ndarray) -> np.ndarray:
        documents = (row.astype(np.uint64)[:, None] << np.uint64(20)) + self.rows.segments[row].astype(np.uint64)
        return np.where(_splitmix64(documents ^ np.uint64(self.key)) >> np.uint64(63), 1, -1) * self.rows.weights[row]


def _flip_signs(rows: PackedRows, seed: int, corpus: int) -> _SignFlippedRows:
    seed_hash = _splitmix64(np.array([seed % 2**64], np.uint64))
    return _SignFlippedRows(rows, int(_splitmix64(seed_hash + np.uint64(corpus))[0]))


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Hash integers with splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
