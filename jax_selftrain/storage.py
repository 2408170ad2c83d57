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
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import cache
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from jax_selftrain.errors import InputError
from jax_selftrain.identity import Process, is_alive, this_process
from jax_selftrain.mirrors import named

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


def sha256_file(path: PathLike) -> str:
    """SHA-256 of a file's bytes as a hex digest, read in blocks."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(obj: Any) -> str:
    """SHA-256 (hex) of plain data (dicts, lists, strings, finite numbers, None), whatever the order of its keys."""
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_folder(folder: PathLike, *, exclude: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Manifest of every file below `folder`: {relative posix path: {"sha256", "bytes"}}, sorted by path.

    `exclude` holds shell patterns on the relative path; `*` also crosses `/`, so `params/*` leaves out a whole tree.
    """
    root, patterns = Path(folder), tuple(exclude)
    names = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    kept = sorted(name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns))
    return {name: {"sha256": sha256_file(root / name), "bytes": (root / name).stat().st_size} for name in kept}


def check_files(
    folder: PathLike,
    files: Mapping[str, Mapping[str, Any]],
    *,
    remedy: str = "make it again, or restore it from a copy",
) -> None:
    """Compare the files in `folder` with a manifest as `hash_folder` makes it; files it does not list are ignored.

    Raises InputError naming the first file that is missing, truncated or changed, and `remedy`.
    """
    for name, entry in sorted(files.items()):
        relative, path = PurePosixPath(name), Path(folder, name)
        if relative.is_absolute() or ".." in relative.parts:
            raise InputError(f"{folder}: its manifest lists {name!r}, which is outside the folder; do not use it")
        if not isinstance(entry, Mapping) or not {"sha256", "bytes"} <= set(entry):
            raise InputError(f"{folder}: the manifest entry of {name!r} has no sha256 and bytes; {remedy}")
        if not path.is_file():
            raise InputError(f"{path}: the file is missing though the manifest lists it; {remedy}")
        size = path.stat().st_size
        if size != entry["bytes"]:
            what = "truncated" if size < entry["bytes"] else "of the wrong size"
            raise InputError(f"{path}: the file is {what} (expected {entry['bytes']} bytes, found {size}); {remedy}")
        found = sha256_file(path)
        if found != entry["sha256"]:
            expected = str(entry["sha256"])
            raise InputError(
                f"{path}: checksum differs from the manifest (expected {expected[:8]}…, found {found[:8]}…); {remedy}"
            )


# ---------------------------------------------------------------- commits


@contextmanager
def commit_file(path: PathLike) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write; on success it is fsynced and renamed to `path` in one step.

    Missing parent folders are made. On any exception the temporary file is removed and `path` stays as it was; what a
    killed process left aside of it goes with the next commit.

    Raises InputError naming `path` when the disk is full or the place cannot be written.
    """
    target = _writable_target(path)
    aside = _aside(target, "tmp")
    with _explained(target, aside):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            clean_leftovers(target.parent, target.name)
            yield aside
            _fsync(aside)
            os.replace(aside, target)
            _fsync(target.parent)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def commit_folder(path: PathLike, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling folder to fill; on success everything in it is fsynced and it is renamed to `path`.

    With `replace`, a folder that stands there already is moved aside for the instant of the rename and then
    removed; a kill in that instant is undone by `clean_leftovers`. Without it, a non-empty one is an InputError.
    On any exception the temporary folder is removed and `path` stays as it was.
    """
    target = _writable_target(path)
    aside, retired = _aside(target, "tmp"), _aside(target, "old")
    occupied = f"{target}: already exists; remove it or choose another place"
    clean_leftovers(target.parent, target.name)
    if target.exists() and not replace and (not target.is_dir() or any(target.iterdir())):
        raise InputError(occupied)
    with _explained(target, aside):
        try:
            aside.mkdir(parents=True)
            yield aside
            for folder, _, names in os.walk(aside):
                for name in names:
                    _fsync(Path(folder, name))
                _fsync(Path(folder))
            if replace and target.exists():
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
    write_text(path, named(text) + "\n")


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


def clean_leftovers(folder: PathLike, name: str = "") -> None:
    """Remove from `folder` what killed processes were writing aside when they died; others' live work is left alone.

    With `name`, only what was to become `folder / name`.

    A folder that was being replaced when its writer died is put back under its own name.
    """
    folder = Path(folder)
    for path in folder.glob(".*") if folder.is_dir() else ():
        match = _ASIDE_NAME.fullmatch(path.name)
        if match is None or (name and match["name"] != name):
            continue
        holder = Process("", match["scope"], int(match["pid"]), int(match["started"]))
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


DISCARDED = ".discarded-"
"""Begins the name of a folder that is being removed."""


def is_passing(name: str) -> bool:
    """Whether a file or folder of this name is a lease, or is being written aside or removed."""
    return name.endswith(".lease") or name.startswith(DISCARDED) or _ASIDE_NAME.fullmatch(name) is not None


def _aside(target: Path, kind: str) -> Path:
    me = this_process()
    return target.with_name(f".{target.name}.{kind}-{me.scope}-{me.pid}-{me.started}-{uuid.uuid4().hex[:8]}")


def _writable_target(path: PathLike) -> Path:
    # `Path` would turn gs://bucket/x into the local folder gs:/bucket/x without a word.
    if re.match(r"[a-z][a-z0-9+]*:/", os.fspath(path)):
        raise InputError(
            f"{os.fspath(path)}: an address; the command line, or `remote.brought_here`, makes it a folder"
        )
    return Path(path)


@contextmanager
def _explained(target: Path, aside: Path) -> Iterator[None]:
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


@contextmanager
def lease(path: PathLike, *, stale_after: float = 600.0) -> Iterator[bool]:
    """Try, without waiting, to claim `path`; yields whether we hold it. Given back (removed) at the end.

    The file names its holder and is touched by a thread of the holder's every `stale_after / 10` seconds. It is
    taken over when the holder is a dead process of this machine, or when it has not been touched for
    `stale_after` seconds (holders on other machines cannot be asked). Of several processes taking over the same
    lease, one wins: the folder is locked meanwhile. Where the file system has no locks two might both win, which
    costs double work and nothing else.
    """
    path = Path(path)
    token = uuid.uuid4().hex
    content = json.dumps({**asdict(this_process()), "token": token}).encode()
    if not _claim(path, content, stale_after):
        yield False
        return
    done = threading.Event()

    def beat() -> None:
        while not done.wait(stale_after / 10):
            try:
                os.utime(path)
            except FileNotFoundError:
                return  # taken over after a long suspension of this process: no longer ours to keep alive
            except OSError:
                continue  # a passing fault of a network file system; the next beat comes long before staleness

    heart = threading.Thread(target=beat, name=f"lease {path.name}", daemon=True)
    heart.start()
    try:
        yield True
    finally:
        done.set()
        heart.join()
        _give_back(path, content)


def _claim(path: Path, content: bytes, stale_after: float) -> bool:
    fresh = _aside(path, "tmp")
    with _explained(path, fresh), _locked(path.parent):
        try:
            _create(path, content)
            return True
        except FileExistsError:
            _create(fresh, content)
        try:
            if not _is_abandoned(path, now=fresh.stat().st_mtime, stale_after=stale_after):
                return False
            os.replace(fresh, path)
            return True
        finally:
            fresh.unlink(missing_ok=True)


def _give_back(path: Path, content: bytes) -> None:
    try:
        with _locked(path.parent):
            if path.read_bytes() == content:  # else: taken over while this process was suspended
                path.unlink()
    except FileNotFoundError:
        return  # the folder was removed, or the lease with it: nothing is held


def _is_abandoned(path: Path, *, now: float, stale_after: float) -> bool:
    """`now` is in the clock of the file system, which on a network differs from ours."""
    try:
        if now - path.stat().st_mtime > stale_after:
            return True
        data = json.loads(path.read_bytes())
        holder = Process(data["host"], data["scope"], data["pid"], data["started"])
    except FileNotFoundError:
        return False  # given back this very moment: the next attempt will find it free
    except (ValueError, KeyError, TypeError):
        return False  # being written, or cut short by a crash: only its age counts
    return is_alive(holder) is False


def _create(path: Path, content: bytes) -> None:
    with open(path, "xb", buffering=0) as stream:
        try:
            stream.write(content)
        except OSError:
            path.unlink()
            raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
                raise  # those mean: no locks on this file system, see `lease`
        yield
    finally:
        os.close(descriptor)  # gives the lock back, too


# ---------------------------------------------------------------- versions


def versions() -> dict[str, str]:
    """Versions of this package and of the libraries that shape its numbers, without importing them."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    from jax_selftrain import __version__

    found = {"jax_selftrain": __version__, "python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "pyarrow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # transformers and others are optional where a stage does not need them
    return found
