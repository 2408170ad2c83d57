"""Small helpers on parameter trees: nested dicts as flat ones, a look for broken numbers, and device arrays brought to
the host piece by piece."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_selftrain.errors import InputError


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"layers/attn/q/kernel": leaf, …} of a nested dict, in sorted order."""
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        value, path = tree[key], f"{prefix}{key}"
        flat |= flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


def find_nonfinite(*trees: Any) -> str | None:
    """Path of the first array that holds NaN or infinity, or None; one program for all, whatever their shapes."""
    paths, leaves = zip(*jax.tree_util.tree_flatten_with_path(trees)[0], strict=True)
    finite = jax.device_get(_all_finite(leaves))
    broken = [
        jax.tree_util.keystr(path[1:], simple=True, separator="/")
        for path, ok in zip(paths, finite, strict=True)
        if not ok
    ]
    return broken[0] if broken else None


@jax.jit
def _all_finite(leaves: tuple[jax.Array, ...]) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def host_layer(array: jax.Array | np.ndarray, layer: int) -> np.ndarray:
    """One layer of a stacked array, on the host; moves that layer only."""
    if isinstance(array, np.ndarray):
        return array[layer]
    out = np.empty(array.shape[1:], array.dtype)
    for shard in _addressable_shards(array):
        start = shard.index[0].indices(array.shape[0])[0]
        out[shard.index[1:]] = np.asarray(shard.data[layer - start])
    return out


def to_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """A whole array on the host."""
    if isinstance(array, np.ndarray):
        return array
    out = np.empty(array.shape, array.dtype)
    for shard in _addressable_shards(array):
        out[shard.index] = np.asarray(shard.data)
    return out


def _addressable_shards(array: jax.Array) -> list[jax.Shard]:
    if not array.is_fully_addressable:
        raise InputError(
            "these weights lie on several machines; save them as a model folder and write the Hugging Face folder from "
            "one machine with: jax-selftrain convert MODEL OUT --format hf"
        )
    return [shard for shard in array.addressable_shards if shard.replica_id == 0]
