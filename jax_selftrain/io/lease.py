"""TODO."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from jax_selftrain.io.atomic import PathLike, os_errors_as_input_errors, temp_path
from jax_selftrain.io.process_id import ProcessId, is_alive, this_process


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
    if not _acquire(path, content, stale_after):
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
        _release(path, content)


@contextmanager
def wait_for_lease(path: PathLike, *, poll_seconds: float = 0.5) -> Iterator[None]:
    """Claim `path` as soon as no other process holds it; see `lease`."""
    while True:
        with lease(path) as claimed:
            if claimed:
                yield
                return
        time.sleep(poll_seconds)


def _acquire(path: Path, content: bytes, stale_after: float) -> bool:
    fresh = temp_path(path, "tmp")
    with os_errors_as_input_errors(path, fresh), _locked(path.parent):
        try:
            _create(path, content)
            return True
        except FileExistsError:
            _create(fresh, content)
        try:
            if not _is_stale(path, now=fresh.stat().st_mtime, stale_after=stale_after):
                return False
            os.replace(fresh, path)
            return True
        finally:
            fresh.unlink(missing_ok=True)


def _release(path: Path, content: bytes) -> None:
    try:
        with _locked(path.parent):
            if path.read_bytes() == content:  # else: taken over while this process was suspended
                path.unlink()
    except FileNotFoundError:
        return  # the folder was removed, or the lease with it: nothing is held


def _is_stale(path: Path, *, now: float, stale_after: float) -> bool:
    """`now` is in the clock of the file system, which on a network differs from ours."""
    try:
        if now - path.stat().st_mtime > stale_after:
            return True
        data = json.loads(path.read_bytes())
        holder = ProcessId(data["host"], data["scope"], data["pid"], data["start_time"])
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
