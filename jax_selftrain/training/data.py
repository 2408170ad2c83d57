"""From packed rows to batches on the mesh; batch n is a pure function of (rows, seed, n)."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jax_selftrain.config import TrainConfig
from jax_selftrain.corpus import Rows, batch_indices
from jax_selftrain.mesh import Layout
from jax_selftrain.training.loss import Batch


def load_batch(config: TrainConfig, layout: Layout, rows: Rows, n: int) -> Batch:
    """Place batch n on the mesh, as `[grad_accum, batch_size / grad_accum, …]`.

    Each process reads from the (memory-mapped) rows only what its own devices hold. Where the corpus has fewer rows
    than a batch, or the run is longer than an epoch, rows come again in the order of the next epoch.
    """
    indices = batch_indices(len(rows.tokens), config.batch_size, config.seed, n).reshape(config.grad_accum, -1)
    sharding = layout.sharding((None, "batch", None))

    def place(array: np.ndarray) -> jax.Array:
        def read(index: Any) -> np.ndarray:
            return array[indices[index[:2]]][..., index[2]]

        return jax.make_array_from_callback((*indices.shape, array.shape[1]), sharding, read)

    return Batch(place(rows.tokens), place(rows.segments), place(rows.positions), place(rows.weights))
