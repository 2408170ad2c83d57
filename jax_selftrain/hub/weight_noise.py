"""Add Gaussian noise of the same size as the change by training.

The control arm of a study. Each tensor's noise has the Frobenius norm of the tensor's change. A student that forgets
less than this control has forgotten nothing in particular.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from jax_selftrain.hub.load import host_sharding
from jax_selftrain.hub.merge import combine_models, describe_inputs
from jax_selftrain.hub.model_ref import open_model
from jax_selftrain.io.rng import make_rng


def add_weight_noise(base: str, student: str, out: str | Path, seed: int, weight: float = 1.0) -> Path:
    """Write base + noise in float32.

    |noise| = weight · |student − base| for every tensor, and for every layer of a tensor stacked over layers. A tensor
    that training did not change stays unchanged.

    Args:
      base: the model that gets the noise.
      student: the model whose distance from the base, times `weight`, is that of the result.
      out: the folder; must not exist, or be empty.
      seed: of the noise; the noise of a tensor depends on (seed, path) alone.

    Raises:
      InputError: a model cannot be read, the two differ in architecture or tokenizer, or the folder holds something.
    """
    first, second = open_model(base), open_model(student)
    metadata = {"made_by": "noise", "seed": seed, "weight": weight} | describe_inputs(first, second)

    def perturb(path: str, before: jax.Array, after: jax.Array) -> np.ndarray:
        old, new = np.asarray(before, np.float32), np.asarray(after, np.float32)
        noise = make_rng("weight noise", seed, path).standard_normal(old.shape, np.float64)
        axes = tuple(range(1 if path.startswith("layers/") else 0, old.ndim))
        size, target = (
            np.sqrt(np.sum(np.square(x, dtype=np.float64), axes, keepdims=True)) for x in (noise, weight * (new - old))
        )
        return (old + noise * (target / np.maximum(size, np.finfo(np.float64).tiny))).astype(np.float32)

    return combine_models(first, second, Path(out), host_sharding(first.config), metadata, perturb)
