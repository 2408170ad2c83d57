"""From packed rows to batches on the mesh; batch n is a pure function of (rows of all corpora, shares, seed, n)."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import jax
import numpy as np

from jax_selftrain.config import TrainConfig
from jax_selftrain.corpus import Mixture, Rows
from jax_selftrain.mesh import Layout
from jax_selftrain.training.loss import Batch


def load_batch(config: TrainConfig, layout: Layout, rows: Rows | Mixture, n: int) -> Batch:
    """Place batch n on the mesh, as `[grad_accum, batch_size / grad_accum, …]`.

    Each process reads from the (memory-mapped) rows of each corpus only what its own devices hold. Where a corpus has
    fewer rows than are asked of it, they come again in the order of its next epoch.

    Args:
      rows: of one corpus, or of several with their shares.
    """
    mixture = rows if isinstance(rows, Mixture) else Mixture((rows,), (Fraction(1),))
    drawn = mixture.batch(config.batch_size, config.seed, n)
    source, row = (each.reshape(config.grad_accum, -1) for each in drawn)
    sharding = layout.sharding((None, "batch", None))

    def place(arrays: list[np.ndarray]) -> jax.Array:
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
        place([part.tokens for part in mixture.parts]),
        place([part.segments for part in mixture.parts]),
        place([part.positions for part in mixture.parts]),
        place([part.weights for part in mixture.parts]),
    )
