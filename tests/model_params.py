"""Parameters and tensors of models, to compare models of different folders, meshes and processes."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from safetensors.numpy import load_file

from jax_selftrain.hub import load_model, safetensors_io


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


def load_host_params(model: Path | str) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(load_model(model, "data=1").params)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def param_bytes(model: Path | str) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_host_params(model).items()}


def load_tensors(folder: Path) -> dict[str, np.ndarray]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def assert_same_tensors(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert ours[name].shape == value.shape, name
        assert ours[name].tobytes() == value.tobytes(), name


@contextmanager
def count_read_bytes() -> Iterator[list[int]]:
    """Collect the size of each part of a tensor that is read."""
    sizes, read_box = [], safetensors_io.read_box

    def count(*arguments: Any) -> np.ndarray:
        data = read_box(*arguments)
        sizes.append(data.nbytes)
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_io, "read_box", count)
        yield sizes
