"""Replace URIs in options by local files and folders."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jax_selftrain.config.metadata import Role, fields_with_role, roles
from jax_selftrain.distributed import sigterm_handler
from jax_selftrain.errors import InputError, Preempted, UnavailableError
from jax_selftrain.io.lease import wait_for_lease
from jax_selftrain.io.remote_paths import remote_cache_dir
from jax_selftrain.remote.local_cache import LocalCache
from jax_selftrain.remote.object_store import Store
from jax_selftrain.remote.upload_session import UploadSession

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")

_URI = re.compile(r"\b([a-z][a-z0-9+]*)://[^\s=:]*")
_IGNORED_SCHEMES = ("http", "https")


@contextmanager
def localize_uris(options: Options, *, exclusive: bool = True) -> Iterator[Options]:
    """Replace the URIs in options by local paths, and upload the outputs.

    Args:
      options: a dataclass of `jax_selftrain.config`. URIs may be in nested dataclasses, tuples and mappings, and inside
        a word, as in `piqa:gs://bucket/piqa.jsonl`.
      exclusive: no other process does the same work.

    Raises:
      InputError: a URI cannot be opened, is empty or damaged, or several processes would write to a URI that cannot be
        mounted.
      UnavailableError: another process writes there, or the store cannot be reached. The local output is kept, and the
        same command resumes from it.
      Preempted: SIGTERM arrived while no other handler was set; the output was uploaded.
    """
    given = {name: getattr(options, name) for name in fields_with_role(type(options), Role.OUTPUT)}
    written = {name: text for name, text in given.items() if isinstance(text, str) and _URI.match(text)}
    for name, path in given.items():
        if path and Role.OUTPUT_FILE in roles(type(options))[name] and not path.endswith(".json"):
            raise InputError(f"--{name} {path}: give the name of a file that ends in .json")

    def stop() -> None:
        raise Preempted("stopped; finished work is kept, run the same command again to resume")

    local = _download_inputs(dataclasses.replace(options, **dict.fromkeys(written, "")))
    with ExitStack() as stack:
        open_output = synced_output if exclusive else gcsfuse_mount
        paths = {name: str(stack.enter_context(open_output(uri))) for name, uri in written.items()}
        stack.enter_context(sigterm_handler(stop) if written else nullcontext())
        yield dataclasses.replace(local, **paths)


def _download_inputs(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        local = {name: _download_inputs(part) for name, part in parts.items()}
        return value if local == parts else dataclasses.replace(value, **local)
    if isinstance(value, str):
        return _URI.sub(lambda found: found[0] if found[1] in _IGNORED_SCHEMES else str(download(found[0])), value)
    if isinstance(value, tuple):
        return tuple(_download_inputs(part) for part in value)
    if isinstance(value, Mapping):
        return {key: _download_inputs(part) for key, part in value.items()}
    return value


def download(uri: str) -> Path:
    """Download the file or folder at a URI; return its local path.

    Only changed files are downloaded. A result (`score.json`) comes with its companion files. Errors are those of
    `localize_uris`.
    """
    store = Store(uri)
    cache = LocalCache(store, "in")
    with cache.lock():
        there = store.listed_objects(within_others=True)
        if not there:
            raise InputError(f"{uri}: no such file or folder")
        cache.pull(there)
    return cache.local_path


@contextmanager
def synced_output(uri: str) -> Iterator[Path]:
    """Yield the local path of an output, and upload it."""
    store = Store(uri)
    if not store.parent.strip("/"):
        raise InputError(f"{uri}: is a whole bucket; pass a folder in it")
    cache = LocalCache(store, "out")
    with cache.lock(), UploadSession(store, cache):
        yield cache.local_path


@contextmanager
def gcsfuse_mount(uri: str) -> Iterator[Path]:
    """Mount the bucket of a URI with gcsfuse; yield the folder.

    Raises:
      InputError: the URI is not of Google Cloud Storage, or gcsfuse is not installed.
      UnavailableError: the bucket cannot be mounted.
    """
    scheme, _, rest = uri.partition("://")
    bucket, _, inside = rest.strip("/").partition("/")
    if scheme != "gs" or shutil.which("gcsfuse") is None:
        remedy = "mount the bucket and pass that folder" if scheme != "gs" else "install gcsfuse to mount the bucket"
        raise InputError(f"{uri}: several processes need a shared folder; {remedy}")
    if not inside or ".." in inside.split("/"):
        raise InputError(f"{uri}: is not the URI of a folder in a bucket")
    point = remote_cache_dir() / "mount" / scheme / bucket
    with wait_for_lease(remote_cache_dir() / "state" / f"mount-{bucket}.lease", resource=f"gs://{bucket}"):
        point.mkdir(parents=True, exist_ok=True)
        if not os.path.ismount(point):
            command = ["gcsfuse", "--implicit-dirs", bucket, str(point)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                message = " ".join((done.stderr or done.stdout).split())[-300:]
                raise UnavailableError(f"{uri}: gcsfuse cannot mount the bucket ({message})")
    yield point / inside
