"""Atomic commits: write a temporary file or folder, fsync, rename.

A reader sees all of a file (or folder) or nothing, whatever kills the writer. The name of a temporary file identifies
its writer, so that the next commit removes those of dead processes. Paths are local or on a shared POSIX file system;
`remote` handles object storage.
"""

import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jax_selftrain.errors import InputError
from jax_selftrain.io.process_id import ProcessId, is_alive, this_process

PathLike = str | os.PathLike[str]

_FULL_DISK = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
}

_FOREIGN_TEMP_SECONDS = 86_400.0
"""Age at which a temporary file of another host, whose processes cannot be checked, counts as stale."""


@contextmanager
def commit_file(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path to write; on success it becomes `path`.

    Missing parent folders are created. After an exception the temporary file is removed and `path` is unchanged.

    Raises:
      InputError: the disk is full or `path` cannot be written.
    """
    with _temporary(path) as (target, temp):
        yield temp
        _fsync(temp)
        os.replace(temp, target)
        _fsync(target.parent)


@contextmanager
def commit_folder(path: PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it becomes `path`.

    With `overwrite`, an existing folder is renamed during the commit and then removed; `remove_stale_temp_files` undoes
    a kill between the two renames. After an exception the temporary folder is removed and `path` is unchanged.

    Raises:
      InputError: without `overwrite`, `path` exists and is not empty; or it cannot be written.
    """
    with _temporary(path) as (target, temp):
        occupied = f"{target}: already exists; remove it or choose another folder"
        if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
            raise InputError(occupied)
        temp.mkdir()
        yield temp
        for written in (*temp.rglob("*"), temp):
            _fsync(written)
        retired = temp_path(target, "old")
        if overwrite and target.exists():
            os.rename(target, retired)
        try:
            os.rename(temp, target)
        except OSError as error:
            if retired.exists():
                os.rename(retired, target)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise InputError(occupied) from error  # another process filled it meanwhile
            raise
        _fsync(target.parent)
        _remove(retired)


@contextmanager
def _temporary(path: PathLike) -> Iterator[tuple[Path, Path]]:
    """Yield the target and a temporary path, removed at the end."""
    # `Path` would silently turn gs://bucket/x into the local folder gs:/bucket/x.
    if re.match(r"[a-z][a-z0-9+]*:/", os.fspath(path)):
        raise InputError(f"{os.fspath(path)}: is a URI; use the command line or `remote.localize_uris`")
    target = Path(path)
    temp = temp_path(target, "tmp")
    with os_errors_as_input_errors(target, temp):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_stale_temp_files(target.parent, target.name)
            yield target, temp
        finally:
            _remove(temp)


def remove_folder(path: Path) -> None:
    """Remove a folder, if it exists, by one rename."""
    hidden = temp_path(path, "tmp")
    with suppress(FileNotFoundError):  # another process may remove it
        path.rename(hidden)
        _remove(hidden)


def write_text(path: PathLike, text: str) -> None:
    """Commit `text` in UTF-8 as the whole content of `path`."""
    with commit_file(path) as temp:
        temp.write_bytes(text.encode())


def remove_stale_temp_files(folder: PathLike, name: str = "") -> None:
    """Remove temporary files and folders of dead processes from `folder`.

    With `name`, only those of `folder / name`. A folder whose replacement was interrupted gets its name back.
    """
    folder = Path(folder)
    for path in folder.glob(".*") if folder.is_dir() else ():
        match = _TEMP_NAME.fullmatch(path.name)
        if match is None or (name and match["name"] != name):
            continue
        holder = ProcessId("", match["scope"], int(match["pid"]), int(match["started"]))
        alive = is_alive(holder)
        try:
            if alive or (alive is None and time.time() - path.lstat().st_mtime < _FOREIGN_TEMP_SECONDS):
                continue
            if match["kind"] == "old" and not (folder / match["name"]).exists():
                os.rename(path, folder / match["name"])
            else:
                _remove(path)
        except FileNotFoundError:
            continue  # another process cleans the same folder


_TEMP_NAME = re.compile(
    r"\.(?P<name>.+)\.(?P<kind>tmp|old)-(?P<scope>[0-9a-f]{12})-(?P<pid>\d+)-(?P<started>\d+)-[0-9a-f]{8}"
)


def is_temporary(name: str) -> bool:
    """Return True for the name of a lease or a temporary file."""
    return name.endswith(".lease") or _TEMP_NAME.fullmatch(name) is not None


def temp_path(target: Path, kind: str) -> Path:
    """Return a new path next to `target` that names this process."""
    me = this_process()
    return target.with_name(f".{target.name}.{kind}-{me.scope}-{me.pid}-{me.start_time}-{uuid.uuid4().hex[:8]}")


@contextmanager
def os_errors_as_input_errors(target: Path, temp: Path | None = None) -> Iterator[None]:
    """Turn a failure to write `target` or `temp` into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        text = str(error)  # libraries (NumPy, safetensors, Orbax) wrap the error of a full disk
        is_short = re.search(r"\d+ requested and \d+ written", text) is not None
        code = errno.ENOSPC if is_short else next((code for code in _FULL_DISK if os.strerror(code) in text), None)
        if code is None and isinstance(error, OSError) and error.errno is not None:
            culprit = target if error.filename is None else Path(os.fsdecode(error.filename))
            if culprit in (temp, target, *target.parents) or temp in culprit.parents:
                code = error.errno
        if code is None:
            raise
        remedy = f"{_FULL_DISK[code]} and run the same command again" if code in _FULL_DISK else "choose another folder"
        raise InputError(f"{target}: cannot be written ({os.strerror(code)}); {remedy}") from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder; the rename is valid anyway
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
