"""The ground floor: how results reach the disk whole, how damage is noticed, and who is working on what.

Three ideas, used by every room. **Commit**: write aside, fsync, rename, so that a reader sees all of a file (or
folder) or nothing of it, whatever kills the writer. **Hash**: a manifest of SHA-256 digests, so that a flipped
byte is named instead of trained on. **Lease**: a small file that says which process works on a shard, taken over
when its holder is dead; because commits are atomic and results deterministic, a lease saves double work but
correctness never hangs on it.

Paths are local or on a shared POSIX file system; what stands for object storage is `remote`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jax_selftrain.errors import InputError
from jax_selftrain.io.process_id import ProcessId, is_alive, this_process
from jax_selftrain.io.remote_paths import restore_uris

PathLike = str | os.PathLike[str]

_REMEDY = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of your quota and run the same command again",
    errno.EFBIG: "the file size limit was reached: raise it (ulimit -f) and run the same command again",
    errno.EACCES: "choose a place you may write to",
    errno.EPERM: "choose a place you may write to",
    errno.EROFS: "choose a place you may write to",
}

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# An aside of another host cannot be asked whether its process lives; after a day without a change it counts as dead.
_FOREIGN_ASIDE_SECONDS = 86_400.0


# ---------------------------------------------------------------- hashes


# ---------------------------------------------------------------- commits


@contextmanager
def commit_file(path: PathLike) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write; on success it is fsynced and renamed to `path` in one step.

    Missing parent folders are made. On any exception the temporary file is removed and `path` stays as it was; what a
    killed process left aside of it goes with the next commit.

    Raises InputError naming `path` when the disk is full or the place cannot be written.
    """
    target = _resolve_target(path)
    aside = temp_path(target, "tmp")
    with os_errors_as_input_errors(target, aside):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_stale_temp_files(target.parent, target.name)
            yield aside
            _fsync(aside)
            os.replace(aside, target)
            _fsync(target.parent)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def commit_folder(path: PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling folder to fill; on success everything in it is fsynced and it is renamed to `path`.

    With `replace`, a folder that stands there already is moved aside for the instant of the rename and then
    removed; a kill in that instant is undone by `clean_leftovers`. Without it, a non-empty one is an InputError.
    On any exception the temporary folder is removed and `path` stays as it was.
    """
    target = _resolve_target(path)
    aside, retired = temp_path(target, "tmp"), temp_path(target, "old")
    occupied = f"{target}: already exists; remove it or choose another place"
    remove_stale_temp_files(target.parent, target.name)
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise InputError(occupied)
    with os_errors_as_input_errors(target, aside):
        try:
            aside.mkdir(parents=True)
            yield aside
            for folder, _, names in os.walk(aside):
                for name in names:
                    _fsync(Path(folder, name))
                _fsync(Path(folder))
            if overwrite and target.exists():
                os.rename(target, retired)
            try:
                os.rename(aside, target)
            except OSError as error:
                if retired.exists():
                    os.rename(retired, target)
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise InputError(occupied) from error  # somebody else filled it meanwhile
                raise
            _fsync(target.parent)
            _remove(retired)
        finally:
            _remove(aside)


def write_bytes(path: PathLike, data: bytes) -> None:
    """Commit `data` as the whole content of `path`."""
    with commit_file(path) as aside:
        aside.write_bytes(data)


def write_text(path: PathLike, text: str) -> None:
    """Commit `text` (UTF-8, newlines as they are) as the whole content of `path`."""
    write_bytes(path, text.encode())


def write_json(path: PathLike, obj: Any) -> None:
    """Commit plain data as indented JSON with sorted keys: equal data gives equal bytes. NaN is a ValueError.

    Addresses in object storage stand in it, not the folders that stand for them here.
    """
    try:
        text = json.dumps(obj, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    write_text(path, restore_uris(text) + "\n")


def read_json(path: PathLike) -> Any:
    """Read a JSON file. Raises InputError naming the file when it is missing, unreadable or not strict JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise InputError(f"{path}: not valid JSON ({error}); the file is damaged or of another kind") from error


def remove_stale_temp_files(folder: PathLike, name: str = "") -> None:
    """Remove from `folder` what killed processes were writing aside when they died; others' live work is left alone.

    With `name`, only what was to become `folder / name`.

    A folder that was being replaced when its writer died is put back under its own name.
    """
    folder = Path(folder)
    for path in folder.glob(".*") if folder.is_dir() else ():
        match = _ASIDE_NAME.fullmatch(path.name)
        if match is None or (name and match["name"] != name):
            continue
        holder = ProcessId("", match["scope"], int(match["pid"]), int(match["started"]))
        alive = is_alive(holder)
        try:
            if alive or (alive is None and time.time() - path.lstat().st_mtime < _FOREIGN_ASIDE_SECONDS):
                continue
            if match["kind"] == "old" and not (folder / match["name"]).exists():
                os.rename(path, folder / match["name"])
            else:
                _remove(path)
        except FileNotFoundError:
            continue  # another process is cleaning the same folder


_ASIDE_NAME = re.compile(
    r"\.(?P<name>.+)\.(?P<kind>tmp|old)-(?P<scope>[0-9a-f]{12})-(?P<pid>\d+)-(?P<started>\d+)-[0-9a-f]{8}"
)


TRASH_PREFIX = ".discarded-"
"""Begins the name of a folder that is being removed."""


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is a lease, or is being written aside or removed."""
    return name.endswith(".lease") or name.startswith(TRASH_PREFIX) or _ASIDE_NAME.fullmatch(name) is not None


def temp_path(target: Path, kind: str) -> Path:
    me = this_process()
    return target.with_name(f".{target.name}.{kind}-{me.scope}-{me.pid}-{me.start_time}-{uuid.uuid4().hex[:8]}")


def _resolve_target(path: PathLike) -> Path:
    # `Path` would turn gs://bucket/x into the local folder gs:/bucket/x without a word.
    if re.match(r"[a-z][a-z0-9+]*:/", os.fspath(path)):
        raise InputError(
            f"{os.fspath(path)}: an address; the command line, or `remote.brought_here`, makes it a folder"
        )
    return Path(path)


@contextmanager
def os_errors_as_input_errors(target: Path, aside: Path) -> Iterator[None]:
    """Turn a failure to write `target` into a sentence; an OSError about some other file is not ours to explain."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            _explain_text(target, error)
            raise
        if error.filename is not None and error.errno not in _NO_ROOM:
            culprit = Path(os.fsdecode(error.filename))
            if culprit not in (aside, target, *target.parents) and aside not in culprit.parents:
                raise
        remedy = _REMEDY.get(error.errno, "choose another place or mend this one")
        raise InputError(f"{target}: cannot be written ({os.strerror(error.errno)}); {remedy}") from error
    except InputError:
        raise
    except Exception as error:
        _explain_text(target, error)
        raise


def _explain_text(target: Path, error: Exception) -> None:
    """Raise InputError if a library (numpy, safetensors, Orbax) wrapped a full disk in an error of its own kind."""
    match = re.search(
        r"No space left on device|Disk quota exceeded|File too large|\d+ requested and \d+ written", str(error)
    )
    if match:
        remedy = _REMEDY[errno.ENOSPC]
        raise InputError(f"{target}: cannot be written ({match[0]}: the disk or quota is full); {remedy}") from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a directory; the rename stands anyway
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


# ---------------------------------------------------------------- leases


# ---------------------------------------------------------------- versions
