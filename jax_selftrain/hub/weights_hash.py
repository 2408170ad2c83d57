"""A fingerprint of weights by their content: the same on any mesh, in any file layout, for host and device arrays.

Hashing files cannot say whether two models are equal: Orbax writes time stamps and random names. So every element is
turned into 64 pseudo-random bits that depend on its bit pattern and its position, and these are summed modulo 2^32 in
two lanes. Integer sums are exact in any order, so each device sums what it holds and nothing is gathered; SHA-256 over
the sums, names, types and shapes is the fingerprint. It tells models apart; damage on disk is the manifest's concern.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_selftrain.hub.trees import flatten
from jax_selftrain.io.manifest import hash_json
from jax_selftrain.models import Params

FULL_HASH_LIMIT = 2**20
"""Elements of an array on a CPU that numpy sums in less time than a program is compiled in."""
_SEEDS = (0x9E3779B9, 0x85EBCA77)


def hash_weights(params: Params) -> str:
    """SHA-256 (hex) that identifies the values of all parameters; collective if they lie on several machines."""
    entries = {}
    for path, array in flatten(params).items():
        words = _numpy_words(np.asarray(array)) if _is_fully_addressable(array) else np.asarray(_device_words(array))
        entries[path] = [np.dtype(array.dtype).name, list(array.shape), words.tolist()]
    return hash_json(entries)


def _is_fully_addressable(array: np.ndarray | jax.Array) -> bool:
    """Whether numpy has done with it before XLA has compiled a program for its shape."""
    if isinstance(array, np.ndarray):
        return True
    return (
        array.is_fully_addressable
        and {device.platform for device in array.devices()} == {"cpu"}
        and array.size <= FULL_HASH_LIMIT
    )


@jax.jit
def _device_words(array: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}").astype(jnp.uint32)
    return _sampled_words(jnp, bits, tuple(jnp.arange(n, dtype=jnp.uint32) for n in array.shape))


def _numpy_words(array: np.ndarray) -> np.ndarray:
    # Blocks along the first dimension, so that temporaries stay small beside the array.
    array = np.ascontiguousarray(array)
    rest = tuple(np.arange(n, dtype=np.uint32) for n in array.shape[1:])
    total = np.zeros(2, np.uint32)
    step = max(1, 2**22 // max(1, array[:1].size))
    for start in range(0, array.shape[0], step):
        block = array[start : start + step]
        bits = block.view(f"u{array.itemsize}").astype(np.uint32)
        index = np.arange(start, start + len(block), dtype=np.uint32)
        total += _sampled_words(np, bits, (index, *rest))
    return total


def _sampled_words(xp: Any, bits: Any, indices: tuple[Any, ...]) -> Any:
    """Two 32-bit sums over all elements; `xp` is numpy or jax.numpy."""
    lanes = []
    for seed in _SEEDS:
        key = bits
        for dimension, index in enumerate(indices):
            # One random word per index of each dimension; their sum keys the element's position.
            word = _mix(xp, index * xp.uint32(0xC2B2AE3D) + xp.uint32((seed * (dimension + 1)) % 2**32))
            key = key + word.reshape([-1 if d == dimension else 1 for d in range(len(indices))])
        lanes.append(xp.sum(_mix(xp, key ^ xp.uint32(seed)), dtype=xp.uint32))
    return xp.stack(lanes)


def _mix(xp: Any, x: Any) -> Any:
    """The finalizer of MurmurHash3: every input bit reaches every output bit."""
    x = (x ^ (x >> xp.uint32(16))) * xp.uint32(0x85EBCA6B)
    x = (x ^ (x >> xp.uint32(13))) * xp.uint32(0xC2B2AE35)
    return x ^ (x >> xp.uint32(16))
