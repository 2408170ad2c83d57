"""Hash of parameters, to compare models on different meshes and processes."""

import hashlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def hash_params(params: Any) -> str:
    """Compute the SHA-256 of all arrays with their paths, dtypes and shapes.

    All processes must call it if they share an array.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        is_shared = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        array = np.asarray(multihost_utils.process_allgather(leaf, tiled=True) if is_shared else leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
