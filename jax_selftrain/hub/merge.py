"""Combine two models in float32: merge, or noise of their distance.

The merge is base + w·(student − base): for w = 0 the base and for w = 1 the student, bit for bit. Between them is
weight interpolation (WiSE-FT, arXiv:2109.01903), beyond the student task arithmetic (arXiv:2212.04089), and before the
base Neon (arXiv:2510.03597): its θ = (1 + v)·base − v·student, for a student trained on samples of its base, is w = −v.
A parameter that is equal in both keeps its value for every w, because the difference is formed first. Arrays are
combined one by one.

Weight noise is a control arm of a study. A student that forgets less than this control has forgotten nothing in
particular.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jax_selftrain.config import MergeConfig, yaml_io
from jax_selftrain.distributed.mesh import mesh_context
from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.errors import InputError
from jax_selftrain.hub.load import read_params, storage_sharding
from jax_selftrain.hub.model_folder import save_model
from jax_selftrain.hub.model_ref import MANIFEST, ModelRef, open_model
from jax_selftrain.io.rng import make_rng


def merge(config: MergeConfig) -> Path:
    """Write base + weight · (student − base) in float32.

    Returns:
      The folder. A folder that already holds the result of the same merge is left as it is.

    Raises:
      InputError: a model cannot be read, the two differ in architecture or tokenizer (says in what), the weight or a
        parameter of the result is not finite, or the folder holds something else.
    """
    yaml_io.require(config)
    weight = config.weight if config.weight is not None else math.nan
    if not abs(weight) <= float(np.finfo(np.float32).max):
        raise InputError(f"--weight {weight}: must be a finite number within the range of float32")
    base, student = open_model(config.base), open_model(config.student)
    metadata = {"made_by": "merge", "weight": weight} | _describe_inputs(base, student)
    out = Path(config.out)
    if _is_complete(out, metadata):
        if not jax.process_index():
            print(f"{out}: this merge exists already; nothing to do")
        return out
    rules = storage_sharding(base.config, config.mesh, config.preset)
    return _combine_models(
        base, student, out, rules, metadata, lambda _, before, after: _lerp(before, after, np.float32(weight))
    )


def add_weight_noise(base: str, student: str, out: str | Path, seed: int, weight: float = 1.0) -> Path:
    """Write base + noise in float32.

    |noise| = weight · |student − base| (Frobenius norms) for every tensor, and for every layer of a tensor stacked over
    layers. A tensor that training did not change stays unchanged. Noise depends on (seed, path of the tensor) alone.

    Raises:
      InputError: a model cannot be read, the two differ in architecture or tokenizer, or the folder holds something.
    """
    first, second = open_model(base), open_model(student)
    metadata = {"made_by": "noise", "seed": seed, "weight": weight} | _describe_inputs(first, second)

    def perturb(path: str, before: jax.Array, after: jax.Array) -> np.ndarray:
        old, new = np.asarray(before, np.float32), np.asarray(after, np.float32)
        noise = make_rng("weight noise", seed, path).standard_normal(old.shape, np.float64)
        axes = tuple(range(1 if path.startswith("layers/") else 0, old.ndim))
        size, target = (
            np.sqrt(np.sum(np.square(x, dtype=np.float64), axes, keepdims=True)) for x in (noise, weight * (new - old))
        )
        return (old + noise * (target / np.maximum(size, np.finfo(np.float64).tiny))).astype(np.float32)

    return _combine_models(first, second, Path(out), storage_sharding(first.config), metadata, perturb)


def _describe_inputs(base: ModelRef, student: ModelRef) -> dict[str, Any]:
    """Describe the two models in the metadata of a result."""
    return {"base": base.provenance, "student": student.provenance}


def _combine_models(
    base: ModelRef,
    student: ModelRef,
    out: Path,
    rules: ShardingRules,
    metadata: Mapping[str, Any],
    combine: Callable[[str, jax.Array, jax.Array], Any],
) -> Path:
    """Write a model whose parameters are `combine(path, base's, student's)`."""
    _check_compatible(base, student)
    weight = metadata["weight"]
    with mesh_context(rules.mesh):
        sides = [flatten_dict(read_params(model, rules, None)[0], sep="/") for model in (base, student)]
        combined = {}
        for path in sorted(sides[0]):
            combined[path] = combine(path, *(side.pop(path) for side in sides))  # frees the two arrays
            if not bool(jnp.isfinite(combined[path]).all()):
                raise InputError(f"{student.ref}: with weight {weight:g}, {path} would be infinite; move it toward 0")
        return save_model(out, unflatten_dict(combined, sep="/"), source=base, metadata=metadata)


@jax.jit
def _lerp(base: jax.Array, student: jax.Array, weight: jax.Array) -> jax.Array:
    base, student = base.astype(jnp.float32), student.astype(jnp.float32)
    between = base + weight * (student - base)
    return jnp.where(weight == 0, base, jnp.where(weight == 1, student, between))


def _check_compatible(base: ModelRef, student: ModelRef) -> None:
    """Refuse models that differ in architecture or tokenizer."""
    # `initializer_range` does not change a model with weights.
    expected, found = (
        flatten_dict(dataclasses.asdict(model.config), sep="/")
        | {"tokenizer": model.tokenizer_fingerprint if model.has_tokenizer else None, "initializer_range": None}
        for model in (base, student)
    )
    for name, value in expected.items():
        if found[name] != value:
            raise InputError(f"{student.ref}: has {name} {found[name]}, but {base.ref} has {value}; both must agree")


def _is_complete(out: Path, expected: Mapping[str, Any]) -> bool:
    """Return True if the folder holds this merge; refuse other content."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    model = open_model(out) if (out / MANIFEST).is_file() else None
    metadata = model.manifest["metadata"] if model else {}
    if model is None or metadata.get("made_by") != "merge":
        raise InputError(f"{out}: already exists; remove it or choose another --out")
    for name, now in expected.items():
        before = metadata.get(name)
        if isinstance(before, dict):  # a model may have moved
            before, now = before.get("fingerprint"), now["fingerprint"]
        if before != now:
            raise InputError(f"{out}: holds a merge with another {name} (before {before}, now {now}); remove it")
    model.verify_weights(fix_hint="remove the folder and run the same command again")
    return True
