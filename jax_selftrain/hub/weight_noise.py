"""Weight noise of a given size: what a change of the weights does that has learnt nothing.

The control arm of a study: the base plus Gaussian noise which, tensor by tensor, is as long (Frobenius norm) as the
change that training made. A student that forgets less than this control has forgotten nothing in particular.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.distributed.sharding import make_sharding_rules
from jax_selftrain.errors import InputError
from jax_selftrain.hub.load import cpu_device
from jax_selftrain.hub.merge import check_compatible, load_params_as_stored
from jax_selftrain.hub.model_folder import model_fingerprint, read_config, save_model
from jax_selftrain.hub.trees import unflatten
from jax_selftrain.io.rng import make_rng
from jax_selftrain.models import axis_sizes


def add_weight_noise(base: str, student: str, out: str | Path, seed: int, weight: float = 1.0) -> Path:
    """Write base + noise as a model folder of ours, in float32, |noise| = weight · |student − base| for every tensor.

    A tensor stacked over layers counts as one tensor a layer. A tensor that training left as it was stays so.

    Args:
      base: the model that gets the noise.
      student: the model whose distance from the base, tensor by tensor, times `weight` is that of the result.
      out: the folder; must not exist, or be empty.
      seed: of the noise; that of a tensor depends on (seed, its path) alone.

    Raises:
      InputError: a model cannot be read, the two differ in architecture or tokenizer, or the folder holds something.
    """
    config, raw = read_config(base)
    check_compatible(base, student)
    mesh = make_mesh("", [cpu_device()])
    rules = make_sharding_rules("replicated", mesh, axis_sizes(config))
    with mesh_context(mesh):
        before, after = (load_params_as_stored(ref, rules) for ref in (base, student))
        params = {}
        for path in sorted(before):
            old, new = (np.asarray(side.pop(path), np.float32) for side in (before, after))
            params[path] = _perturb(
                old, weight * (new - old), make_rng("weight noise", seed, path), stacked=path.startswith("layers/")
            )
            if not np.isfinite(params[path]).all():
                raise InputError(f"{student}: {path} lies infinitely far from {base}")
        metadata = {
            "made_by": "noise",
            "seed": seed,
            "weight": weight,
            "base": {"ref": base, "fingerprint": model_fingerprint(base)},
            "student": {"ref": student, "fingerprint": model_fingerprint(student)},
        }
        save_model(out, raw, unflatten(params), source_ref=base, metadata=metadata)
    return Path(out)


def _perturb(old: np.ndarray, change: np.ndarray, rng: np.random.Generator, *, stacked: bool) -> np.ndarray:
    noise = rng.standard_normal(old.shape, np.float64)
    axes = tuple(range(1 if stacked else 0, old.ndim))
    size, wanted = (np.sqrt(np.sum(np.square(x, dtype=np.float64), axes, keepdims=True)) for x in (noise, change))
    return (old + noise * (wanted / np.maximum(size, np.finfo(np.float64).tiny))).astype(np.float32)
