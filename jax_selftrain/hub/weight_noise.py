"""Add Gaussian noise of the same size as the change by training.

The control arm of a study. Each tensor's noise has the Frobenius norm of the tensor's change. A student that forgets
less than this control has forgotten nothing in particular.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict

from jax_selftrain.distributed.mesh import mesh_context
from jax_selftrain.errors import InputError
from jax_selftrain.hub.load import host_sharding
from jax_selftrain.hub.merge import check_compatible, describe_inputs, load_stored
from jax_selftrain.hub.model_folder import save_model
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
    check_compatible(first, second)
    rules = host_sharding(first.config)
    with mesh_context(rules.mesh):
        before, after = load_stored(first, rules), load_stored(second, rules)
        params = {}
        for path in sorted(before):
            old, new = (np.asarray(side.pop(path), np.float32) for side in (before, after))
            params[path] = _perturb(
                old, weight * (new - old), make_rng("weight noise", seed, path), stacked=path.startswith("layers/")
            )
            if not np.isfinite(params[path]).all():
                raise InputError(f"{student}: the distance of {path} from {base} is infinite")
        metadata = {"made_by": "noise", "seed": seed, "weight": weight} | describe_inputs(first, second)
        return save_model(out, unflatten_dict(params, sep="/"), source=first, metadata=metadata)


def _perturb(old: np.ndarray, change: np.ndarray, rng: np.random.Generator, *, stacked: bool) -> np.ndarray:
    noise = rng.standard_normal(old.shape, np.float64)
    axes = tuple(range(1 if stacked else 0, old.ndim))
    size, target = (np.sqrt(np.sum(np.square(x, dtype=np.float64), axes, keepdims=True)) for x in (noise, change))
    return (old + noise * (target / np.maximum(size, np.finfo(np.float64).tiny))).astype(np.float32)
