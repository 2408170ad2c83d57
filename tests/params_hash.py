"""A hash of parameters by value, for comparing models on different meshes and processes."""

import hashlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def hash_params(params: Any) -> str:
    """Compute the SHA-256 of all arrays with their paths, dtypes and shapes; collective where processes share them."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        shared = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        array = np.asarray(multihost_utils.process_allgather(leaf, tiled=True) if shared else leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
