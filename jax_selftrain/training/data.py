"""From packed rows to batches on the mesh; batch n is a pure function of (rows of all corpora, shares, seed, n)."""

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
    """Place batch n on the mesh, as `[grad_accum, batch_size / grad_accum, …]`.

    Each process reads from the (memory-mapped) rows of each corpus only what its own devices hold. Where a corpus has
    fewer rows than are asked of it, they come again in the order of its next epoch.

    With `sign_flip`, the weights of each document in a row are multiplied by +1 or −1, drawn by (seed, row, document)
    alone: the same in every epoch.

    Args:
      rows: of one corpus, or of several with their shares.
    """
    mixture = rows if isinstance(rows, Mixture) else Mixture((rows,), (Fraction(1),))
    drawn = mixture.batch(config.batch_size, config.seed, n)
    weights = [
        _sign_flip(part, config.seed, number) if config.random_loss_sign else part.weights
        for number, part in enumerate(mixture.components)
    ]
    source, row = (each.reshape(config.grad_accum, -1) for each in drawn)
    sharding = rules.sharding((None, "batch", None))

    def place(arrays: Sequence[np.ndarray | _SignFlippedRows]) -> jax.Array:
        length = arrays[0].shape[1]

        def read(index: Any) -> np.ndarray:
            sources, rows = source[index[:2]], row[index[:2]]
            values = np.empty((*rows.shape, length), arrays[0].dtype)
            for corpus in np.unique(sources).tolist():
                chosen = sources == corpus
                values[chosen] = arrays[corpus][rows[chosen]]
            return values[..., index[2]]

        return jax.make_array_from_callback((*row.shape, length), sharding, read)

    return Batch(
        place([part.tokens for part in mixture.components]),
        place([part.segments for part in mixture.components]),
        place([part.positions for part in mixture.components]),
        place(weights),
    )


@dataclass(frozen=True)
class _SignFlippedRows:
    """The weights of rows, those of every document times +1 or −1, read as they are asked for."""

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


def _sign_flip(rows: PackedRows, seed: int, corpus: int) -> _SignFlippedRows:
    return _SignFlippedRows(
        rows, int(_splitmix64(_splitmix64(np.array([seed % 2**64], np.uint64)) + np.uint64(corpus))[0])
    )


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele, Lea and Flood, OOPSLA 2014): every bit depends on every bit."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
