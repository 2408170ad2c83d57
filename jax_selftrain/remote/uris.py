"""Options that are addresses, with local files and folders in their place."""

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
from jax_selftrain.io.remote_paths import remote_cache_dir
from jax_selftrain.remote.local_cache import LocalCache, wait_for_lease
from jax_selftrain.remote.object_store import Store
from jax_selftrain.remote.upload_session import UploadSession

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")

_ADDRESS = re.compile(r"\b([a-z][a-z0-9+]*)://[^\s=:]*")
_IGNORED_SCHEMES = ("http", "https")


@contextmanager
def localize_uris(options: Options, *, exclusive: bool = True) -> Iterator[Options]:
    """The options with a local file or folder in place of each address; what they write is sent back.

    Args:
      options: a dataclass of `jax_selftrain.config`; addresses may stand in nested ones, lists and mappings, and within
        a word, as in `piqa:gs://bucket/piqa.jsonl`.
      alone: whether no other process does the same work.

    Raises:
      InputError: an address cannot be opened, holds nothing or is damaged, or several processes would write to one that
        is not mounted.
      UnavailableError: another process writes there, or the store cannot be reached. What was made and could not be
        sent stays in the local folder, and the same command goes on with it.
      Stopped: SIGTERM came, where nothing else listens to it; what there is has been sent.
    """
    given = {name: getattr(options, name) for name in fields_with_role(type(options), Role.OUTPUT)}
    written = {name: text for name, text in given.items() if isinstance(text, str) and _ADDRESS.match(text)}
    for name, address in written.items():
        if Role.OUTPUT_FILE in roles(type(options))[name] and not address.endswith(".json"):
            raise InputError(f"--{name} {address}: give the name of a file that ends in .json")

    def stop() -> None:
        raise Preempted("stopped; what was finished stays, run the same command again to go on")

    here = _download_inputs(dataclasses.replace(options, **dict.fromkeys(written, "")))
    with ExitStack() as stack:
        place = synced_output if exclusive else gcsfuse_mount
        places = {name: str(stack.enter_context(place(address))) for name, address in written.items()}
        stack.enter_context(sigterm_handler(stop) if written else nullcontext())
        yield dataclasses.replace(here, **places)


def _download_inputs(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        here = {name: _download_inputs(part) for name, part in parts.items()}
        return value if here == parts else dataclasses.replace(value, **here)
    if isinstance(value, str):
        return _ADDRESS.sub(lambda found: found[0] if found[1] in _IGNORED_SCHEMES else str(download(found[0])), value)
    if isinstance(value, tuple):
        return tuple(_download_inputs(part) for part in value)
    if isinstance(value, Mapping):
        return {key: _download_inputs(part) for key, part in value.items()}
    return value


def download(uri: str) -> Path:
    """The file or folder at an address, fetched as far as it is not here yet; with a result (`score.json`) come the
    files that stand beside it under its name.

    Raises:
      InputError, UnavailableError: see `brought_here`.
    """
    store = Store(uri)
    mirror = LocalCache(store, "in")
    with mirror.locked():
        there = store.listed_objects(within_others=True)
        if not there:
            raise InputError(f"{uri}: no such file or folder")
        mirror.pull(there)
    return mirror.local_path


@contextmanager
def synced_output(address: str) -> Iterator[Path]:
    """A local file or folder in place of the address of an output: what is there already is fetched, and what becomes
    of it is sent while the body runs and at its end.

    Raises:
      InputError, UnavailableError: see `brought_here`.
    """
    store = Store(address)
    if not store.parent.strip("/"):
        raise InputError(f"{address}: is a whole bucket; give a folder in it")
    mirror = LocalCache(store, "out")
    with mirror.locked(), UploadSession(store, mirror) as writer:
        yield mirror.local_path
        writer.ended_well = True


@contextmanager
def gcsfuse_mount(address: str) -> Iterator[Path]:
    """The folder of an address in its bucket, which gcsfuse mounts unless it is mounted already, and stays so.

    Raises:
      InputError: it is no address of Google Cloud Storage, or gcsfuse is not installed.
      UnavailableError: the bucket cannot be mounted.
    """
    scheme, _, rest = address.partition("://")
    bucket, _, inside = rest.strip("/").partition("/")
    if scheme != "gs" or shutil.which("gcsfuse") is None:
        raise InputError(
            f"{address}: several processes write into one folder that all of them see; "
            + ("install gcsfuse, which mounts the bucket" if scheme == "gs" else "mount it, and give that folder")
        )
    if not inside or ".." in inside.split("/"):
        raise InputError(f"{address}: is no address of a folder in a bucket")
    point = remote_cache_dir() / "mount" / scheme / bucket
    with wait_for_lease(remote_cache_dir() / "state" / f"mount-{bucket}.lease", f"gs://{bucket}"):
        point.mkdir(parents=True, exist_ok=True)
        if not os.path.ismount(point):
            command = ["gcsfuse", "--implicit-dirs", bucket, str(point)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = " ".join((done.stderr or done.stdout).split())[-300:]
                raise UnavailableError(f"{address}: gcsfuse cannot mount the bucket ({said})")
    yield point / inside
