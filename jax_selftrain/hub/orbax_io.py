"""Trees of arrays on disk: Orbax writes and reads them, a SHA-256 manifest tells whether they are still the same.

The only module that knows Orbax (its `v1` API), so that a change there ends here. Orbax by itself restored a flipped
byte without a word; hence `manifest.json`, written last, lists every array and the digest of every file, and reading
checks them all before a single array is restored. A tree without a manifest was never finished and is refused.

Arrays are stored independently of the mesh that held them and are restored onto any other. In a program of several
processes Orbax saves with all of them together, whatever the arrays lie on; loading onto devices of one process (a
replica mesh) waits for no other.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.io.manifest import folder_manifest, verify_checksums

MANIFEST = "manifest.json"
_FORMAT, _VERSION = "jax_selftrain.tree", 1

Tree = TypeVar("Tree")


class AsyncSave:
    """A save that goes on in the background: whole on disk once `result()` has returned."""

    def __init__(self, future: Future[None]):
        self._future = future

    def is_finished(self) -> bool:
        """Whether it has ended, well or not."""
        return self._future.done()

    def result(self) -> None:
        """Wait for the end, and raise what went wrong."""
        self._future.result()


def save_tree(folder: str | Path, tree: Any) -> None:
    """Write a tree of device or host arrays into a new folder, with its manifest.

    Args:
      folder: must not exist. Several processes all pass the same one, on a file system that all of them see.
      tree: any pytree of jax or numpy arrays.

    Raises:
      InputError: the folder exists already, or cannot be written.
    """
    save_tree_async(folder, tree).result()


def save_tree_async(folder: str | Path, tree: Any) -> AsyncSave:
    """Like `save_tree`, but return once the values are safe from what the caller does next.

    On return every value has been copied to the host, or is held so that JAX copies rather than overwrites it: the
    arrays may be donated or deleted at once. The folder has its manifest, and so counts as whole, when `result()`
    has returned.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise InputError(f"{folder}: already exists; remove it or choose another place")
    arrays = {path: {"shape": list(x.shape), "dtype": np.dtype(x.dtype).name} for path, x in _key_paths(tree).items()}
    context = ocp.Context()
    context.array.saving.use_compression = False  # float weights shrink by 8 % for 2 to 5 times the processor time
    with context:
        response = ocp.save_async(folder, jax.tree.map(_supported, tree))

    def finish() -> None:
        try:
            response.result()
        except BaseException:
            _wait_for_writers(folder.parent)
            raise
        if jax.process_index() == 0:
            content = {
                "format": _FORMAT,
                "version": _VERSION,
                "arrays": arrays,
                "files": folder_manifest(folder),
            }
            atomic.write_json(folder / MANIFEST, content)

    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save_tree")
    future = executor.submit(finish)
    executor.shutdown(wait=False)
    return AsyncSave(future)


def _wait_for_writers(folder: Path, idle_timeout: float = 0.5, total_timeout: float = 30.0) -> None:
    """Wait until nothing in the folder has changed for a while, so that whoever removes it removes everything.

    Orbax raises at the first file that cannot be written, while its other threads still write theirs; there is no
    handle on them.
    """
    seen, since, began = None, time.monotonic(), time.monotonic()
    while time.monotonic() - since < idle_timeout and time.monotonic() - began < total_timeout:
        found = sorted(str(path) for path in folder.rglob("*"))
        if found != seen:
            seen, since = found, time.monotonic()
        time.sleep(0.05)


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
    manifest = verify_tree(folder, remedy=remedy)
    saved = {path: tuple(entry["shape"]) for path, entry in manifest["arrays"].items()}
    asked = {path: tuple(leaf.shape) for path, leaf in _key_paths(abstract).items()}
    for path in sorted(saved.keys() | asked.keys()):
        if saved.get(path) != asked.get(path):
            raise InputError(
                f"{folder}: {path} has shape {saved.get(path, 'none')}, but {asked.get(path, 'none')} is asked for, "
                f"so it was saved from another model or optimizer; {remedy}"
            )
    with _context(abstract):
        return ocp.load(folder, abstract)


def verify_tree(folder: Path, *, remedy: str) -> dict[str, Any]:
    """Compare every file of a saved tree with its manifest, and return that; see `load_tree` for what is raised."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder}: has no {MANIFEST}, so it is not a tree of ours or was never finished; {remedy}")
    manifest = atomic.read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise InputError(f"{path}: not the manifest of a saved tree; {remedy}")
    if manifest.get("version") != _VERSION:
        raise InputError(f"{path}: format version {manifest.get('version')!r} is not {_VERSION}; use a newer release")
    if not manifest.get("files") or not isinstance(manifest.get("arrays"), dict):
        raise InputError(f"{path}: lists no files or no arrays; {remedy}")
    verify_checksums(folder, manifest["files"], fix_hint=remedy)
    return manifest


def _key_paths(tree: Any) -> dict[str, Any]:
    """Leaves by their path in the tree, for instance `mu/layers/attn/q/kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _supported(leaf: Any) -> Any:
    # Orbax refuses numpy scalars, which numpy arithmetic on 0-d arrays returns.
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf


def _context(abstract: Any) -> ocp.Context:
    """Which processes take part in a load: those that hold a part of its result."""
    context = ocp.Context()
    leaves = jax.tree.leaves(abstract)
    processes = {device.process_index for leaf in leaves for device in leaf.sharding.device_set}
    if len(processes) < jax.process_count():
        primary = min(processes)
        context.multiprocessing.primary_host = primary
        context.multiprocessing.active_processes = processes
        context.multiprocessing.barrier_sync_key_prefix = f"process-{primary}"
    return context
