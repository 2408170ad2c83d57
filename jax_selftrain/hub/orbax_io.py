"""Orbax trees with a SHA-256 manifest: training checkpoints, and `convert --format flax`.

The only module that imports Orbax (its `v1` API). Orbax restored a flipped byte silently; hence `manifest.json`,
written last, lists every array and the SHA-256 of every file, and loading verifies all files first. A tree without a
manifest was never finished and is refused.

Arrays are restored onto any mesh. Several processes save together; loading onto devices of one process needs no other.
"""

import time
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from jax_selftrain.errors import InputError
from jax_selftrain.io import json_files
from jax_selftrain.io.manifest import folder_manifest, read_manifest, verify_checksums

MANIFEST = "manifest.json"
_FORMAT, _VERSION = "jax_selftrain.tree", 1
_REMEDY = "make it again, or restore it from a copy"

Tree = TypeVar("Tree")


def save_tree(folder: str | Path, tree: Any) -> None:
    """Write a pytree of device or host arrays with a manifest.

    All processes pass the same new folder, on a shared file system.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise InputError(f"{folder}: already exists; remove it or choose another folder")
    context = ocp.Context()
    context.array.saving.use_compression = False  # float weights shrink by 8 % for 2 to 5 times the processor time
    try:
        with context:
            # Orbax refuses numpy scalars, which numpy arithmetic on 0-d arrays returns.
            ocp.save(
                folder, jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf, tree)
            )
    except BaseException:
        _wait_for_writers(folder.parent)
        raise
    if jax.process_index() == 0:
        arrays = {name: {"shape": list(x.shape), "dtype": x.dtype.name} for name, x in _key_paths(tree).items()}
        content = {"format": _FORMAT, "version": _VERSION, "arrays": arrays, "files": folder_manifest(folder)}
        json_files.write_json(folder / MANIFEST, content)


def _wait_for_writers(folder: Path, idle_timeout: float = 0.5, total_timeout: float = 30.0) -> None:
    """Wait for Orbax's other threads, which still write when it raises."""
    seen, since, began = None, time.monotonic(), time.monotonic()
    while time.monotonic() - since < idle_timeout and time.monotonic() - began < total_timeout:
        found = sorted(str(path) for path in folder.rglob("*"))
        if found != seen:
            seen, since = found, time.monotonic()
        time.sleep(0.05)


def load_tree(folder: str | Path, abstract: Tree, *, remedy: str = _REMEDY) -> Tree:
    """Verify a saved tree and read it onto a mesh.

    Args:
      folder: written by `save_tree`.
      abstract: the tree with `jax.ShapeDtypeStruct` leaves that have shardings. Values are cast to their dtypes.
      remedy: what the user should do about damage, for the message.

    Raises:
      InputError: a file is missing, truncated or changed (named), the tree was never finished, or its arrays differ
        from those of `abstract`.
    """
    folder = Path(folder).absolute()
    manifest = read_tree_manifest(folder, remedy=remedy)
    verify_checksums(folder, manifest["files"], fix_hint=remedy)
    saved = {path: tuple(entry["shape"]) for path, entry in manifest["arrays"].items()}
    expected = {path: tuple(leaf.shape) for path, leaf in _key_paths(abstract).items()}
    for path in sorted(saved.keys() | expected.keys()):
        if saved.get(path) != expected.get(path):
            found = f"has shape {saved.get(path, 'none')}, expected {expected.get(path, 'none')}"
            raise InputError(f"{folder}: {path} {found}, so it is of another model or optimizer; {remedy}")
    with _context(abstract):
        return ocp.load(folder, abstract)


def read_tree_manifest(folder: Path, *, remedy: str = _REMEDY) -> dict[str, Any]:
    """Read the manifest of a saved tree: `arrays` and `files`."""
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: has no {MANIFEST}, so it is no tree of arrays or was never finished; {remedy}")
    return read_manifest(folder / MANIFEST, _FORMAT, _VERSION, {"files": dict, "arrays": dict}, remedy=remedy)


def find_nonfinite(*trees: Any) -> str | None:
    """Find the path of the first array that holds NaN or infinity."""
    paths, leaves = zip(*(leaf for tree in trees for leaf in _key_paths(tree).items()), strict=True)
    finite = jax.device_get(_all_finite(leaves))
    return next((path for path, is_finite in zip(paths, finite, strict=True) if not is_finite), None)


@jax.jit
def _all_finite(leaves: tuple[jax.Array, ...]) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def _key_paths(tree: Any) -> dict[str, Any]:
    """Return leaves by their path in the tree, for instance `mu/layers/attn/q/kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _context(abstract: Any) -> ocp.Context:
    """Make a context of the processes that hold the result."""
    context = ocp.Context()
    leaves = jax.tree.leaves(abstract)
    processes = {device.process_index for leaf in leaves for device in leaf.sharding.device_set}
    if len(processes) < jax.process_count():
        primary = min(processes)
        context.multiprocessing.primary_host = primary
        context.multiprocessing.active_processes = processes
        context.multiprocessing.barrier_sync_key_prefix = f"process-{primary}"
    return context
