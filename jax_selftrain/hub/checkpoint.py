"""Trees of arrays on disk: Orbax writes and reads them, a SHA-256 manifest tells whether they are still the same.

The only module that knows Orbax (its `v1` API), so that a change there ends here. Orbax by itself restored a flipped
byte without a word; hence `manifest.json`, written last, lists the digest of every file, and reading checks them all
before a single array is restored. A tree without a manifest was never finished and is refused.

Arrays are stored independently of the mesh that held them and are restored onto any other. Where all arrays of a tree
lie on one process (replica meshes, host arrays), no other process is waited for; a tree that spans processes is saved
and loaded by all of them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jax_selftrain import storage
from jax_selftrain.errors import InputError

MANIFEST = "manifest.json"
_FORMAT, _VERSION = "jax_selftrain.tree", 1

Tree = TypeVar("Tree")


class PendingSave:
    """A save that goes on in the background: whole on disk once `result()` has returned."""

    def __init__(self, future: Future[None]):
        self._future = future

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._future.done()

    def result(self) -> None:
        """Wait for the end, and raise what went wrong."""
        self._future.result()


def save_tree(folder: str | Path, tree: Any) -> None:
    """Write a tree of device or host arrays into a new folder, with its manifest.

    Args:
      folder: must not exist; for a tree that spans processes, on a file system that all of them see.
      tree: any pytree of jax or numpy arrays.

    Raises:
      InputError: the folder exists already, or cannot be written.
    """
    save_tree_async(folder, tree).result()


def save_tree_async(folder: str | Path, tree: Any) -> PendingSave:
    """Like `save_tree`, but return once the values are safe from what the caller does next.

    On return every value has been copied to the host, or is held so that JAX copies rather than overwrites it: the
    arrays may be donated or deleted at once. The folder has its manifest, and so counts as whole, when `result()`
    has returned.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise InputError(f"{folder}: already exists; remove it or choose another place")
    tree = jax.tree.map(_supported, tree)
    with _context(tree):
        response = ocp.save_async(folder, tree)

    def finish() -> None:
        response.result()
        if _is_writer(tree):
            files = storage.hash_folder(folder)
            storage.write_json(folder / MANIFEST, {"format": _FORMAT, "version": _VERSION, "files": files})

    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save_tree")
    future = executor.submit(finish)
    executor.shutdown(wait=False)
    return PendingSave(future)


def load_tree(folder: str | Path, abstract: Tree, *, remedy: str = "make it again, or restore it from a copy") -> Tree:
    """Check every byte of a saved tree and read it onto a mesh.

    Args:
      folder: written by `save_tree`.
      abstract: the tree's structure with `jax.ShapeDtypeStruct` leaves that carry shardings. Values are cast to the
        types it names.
      remedy: what the user should do about damage, for the message.

    Raises:
      InputError: a file is missing, truncated or changed (named), the tree was never finished, or it does not hold the
        arrays that `abstract` asks for.
    """
    folder = Path(folder).absolute()
    check_tree(folder, remedy=remedy)
    with _context(abstract):
        try:
            return ocp.load(folder, abstract)
        except (ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{folder}: does not hold the arrays that are asked for ({reason}); {remedy}") from error


def check_tree(folder: Path, *, remedy: str) -> None:
    """Compare every file of a saved tree with its manifest; see `load_tree` for what is raised."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder}: has no {MANIFEST}, so it is not a tree of ours or was never finished; {remedy}")
    manifest = storage.read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT or not manifest.get("files"):
        raise InputError(f"{path}: not the manifest of a saved tree; {remedy}")
    if manifest.get("version") != _VERSION:
        raise InputError(f"{path}: format version {manifest.get('version')!r} is not {_VERSION}; use a newer release")
    storage.check_files(folder, manifest["files"], remedy=remedy)


def _supported(leaf: Any) -> Any:
    # Orbax refuses numpy scalars, which numpy arithmetic on 0-d arrays returns.
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf


def _processes(tree: Any) -> set[int]:
    """The processes that hold parts of a tree; host arrays are this one's."""
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree)]
    devices = {device for sharding in shardings if sharding is not None for device in sharding.device_set}
    return {device.process_index for device in devices} or {jax.process_index()}


def _is_writer(tree: Any) -> bool:
    return jax.process_index() == min(_processes(tree))


def _context(tree: Any) -> ocp.Context:
    processes = _processes(tree)
    if jax.process_count() == 1 or len(processes) == jax.process_count():
        return ocp.Context()
    primary = min(processes)
    options: Mapping[str, Any] = {
        "primary_host": primary,
        "active_processes": processes,
        "barrier_sync_key_prefix": f"process-{primary}",
    }
    return ocp.Context(multiprocessing_options=ocp.options.MultiprocessingOptions(**options))
