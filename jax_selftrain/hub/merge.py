"""Merging: the line through the parameters of two models, base + w·(student − base).

w = 0 is the base and w = 1 the student, both to the last bit. Between them lie the averages of weight interpolation
(WiSE-FT, arXiv:2109.01903), beyond the student what task arithmetic adds (arXiv:2212.04089), and before the base what
Neon takes away (arXiv:2510.03597): its θ = (1 + v)·base − v·student, for a student trained on samples of its own base,
is w = −v.

The difference is formed first, rather than (1 − w)·base + w·student: a parameter in which both agree then keeps its
value for every w, and where the two are within a factor of two, as fine-tuning leaves most, the difference is exact and
only the product and the sum are rounded. Everything is computed in float32 and kept so, array by array: beside the two
models as they are stored, memory holds one array and what has taken the place of the arrays it was made from.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_selftrain.config import MergeConfig, yaml_io
from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.distributed.sharding import ShardingRules, make_sharding_rules
from jax_selftrain.errors import InputError
from jax_selftrain.hub import orbax_io
from jax_selftrain.hub.load import cpu_device, read_params
from jax_selftrain.hub.model_folder import (
    PARAMS,
    is_native,
    model_fingerprint,
    read_config,
    read_model_json,
    resolve,
    save_model,
)
from jax_selftrain.hub.tokenizer import has_tokenizer, tokenizer_hash
from jax_selftrain.hub.trees import flatten, unflatten
from jax_selftrain.models import DecoderConfig, Params, axis_sizes

_ONLY_FOR_TRAINING = ("initializer_range",)
"""Fields of the architecture that a model with weights has no use for."""


def merge(config: MergeConfig) -> Path:
    """Write base + weight · (student − base) as a model folder of ours, in float32.

    Returns:
      The folder. The result of the same merge is recognized and left as it is.

    Raises:
      InputError: a model cannot be read, the two differ in architecture or tokenizer (says in what), the weight or a
        parameter of the result is not finite, or the folder holds something else.
    """
    yaml_io.require(config)
    weight = config.weight if config.weight is not None else math.nan
    if not abs(weight) <= float(np.finfo(np.float32).max):
        raise InputError(f"--weight {weight}: must be a finite number within the range of float32")
    base, raw = read_config(config.base)
    check_compatible(config.base, config.student)
    metadata = {
        "made_by": "merge",
        "weight": weight,
        "base": {"ref": config.base, "fingerprint": model_fingerprint(config.base)},
        "student": {"ref": config.student, "fingerprint": model_fingerprint(config.student)},
    }
    out = Path(config.out)
    if _is_complete(out, metadata):
        if not jax.process_index():
            print(f"{out}: this merge is there already; nothing to do")
        return out
    alone = not config.mesh and jax.process_count() == 1
    mesh = make_mesh("", [cpu_device()]) if alone else make_mesh(config.mesh)
    rules = make_sharding_rules(config.preset, mesh, axis_sizes(base))
    with mesh_context(mesh):
        sides = [load_params_as_stored(ref, rules) for ref in (config.base, config.student)]
        params = _interpolate(sides[0], sides[1], weight)
        save_model(out, raw, params, source_ref=config.base, metadata=metadata)
    return out


def load_params_as_stored(ref: str, rules: ShardingRules) -> dict[str, jax.Array]:
    """Parameters by path, each in the type that it is stored in."""
    path = resolve(ref)
    config, raw = read_config(path)
    params, _ = read_params(ref, path, config, raw, rules, None)
    return flatten(params)


def _interpolate(base: dict[str, jax.Array], student: dict[str, jax.Array], weight: float) -> Params:
    """The merged parameters; empties its arguments on the way, so that each array is freed once it is used."""
    merged = {}
    for path in sorted(base):
        merged[path] = _lerp(base.pop(path), student.pop(path), np.float32(weight))
        if not bool(jnp.isfinite(merged[path]).all()):
            raise InputError(f"--weight {weight:g}: {path} would be infinite; give a weight nearer to 0")
    return unflatten(merged)


@jax.jit
def _lerp(base: jax.Array, student: jax.Array, weight: jax.Array) -> jax.Array:
    base, student = base.astype(jnp.float32), student.astype(jnp.float32)
    between = base + weight * (student - base)
    return jnp.where(weight == 0, base, jnp.where(weight == 1, student, between))


def check_compatible(base: str, student: str) -> None:
    """Raise InputError, saying in what, where two models differ in architecture or tokenizer."""
    expected, found = (_fields(read_config(ref)[0]) for ref in (base, student))
    for name, value in expected.items():
        if found[name] != value:
            raise InputError(
                f"{student}: has {name} {found[name]}, but {base} has {value}; only models of one architecture can be "
                "merged"
            )
    marks = []
    for ref in (base, student):
        path = resolve(ref)
        marks.append(tokenizer_hash(path) if has_tokenizer(path) else None)
    if marks[0] != marks[1]:
        shown = [f"{mark[:8]}…" if mark else "none" for mark in marks]
        raise InputError(
            f"{student}: has another tokenizer ({shown[1]}) than {base} ({shown[0]}); only models with the same tokens "
            "can be merged"
        )


def _fields(config: DecoderConfig) -> dict[str, Any]:
    """{"hidden_size": 64, "rope/theta": 10000.0, …}"""
    fields = flatten(dataclasses.asdict(config))
    return {name: value for name, value in fields.items() if name not in _ONLY_FOR_TRAINING}


def _is_complete(out: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether the folder holds this very merge, whole; whatever else is in it is refused."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    metadata = read_model_json(out).get("metadata") if out.is_dir() and is_native(out) else None
    if not isinstance(metadata, dict) or metadata.get("made_by") != "merge":
        raise InputError(f"{out}: already exists; remove it or choose another place")
    for name in ("base", "student"):
        found, expected = metadata.get(name), wanted[name]["fingerprint"]
        mark = found.get("fingerprint") if isinstance(found, dict) else None
        if mark != expected:
            raise InputError(
                f"{out}: holds a merge with another {name} (fingerprint {str(mark)[:8]}…, now {expected[:8]}…); remove "
                "it or choose another --out"
            )
    if metadata.get("weight") != wanted["weight"]:
        raise InputError(
            f"{out}: holds a merge with --weight {metadata.get('weight')}, not {wanted['weight']}; remove it or choose "
            "another --out"
        )
    orbax_io.verify_tree(out / PARAMS, remedy="remove the folder and run the same command again")
    return True
