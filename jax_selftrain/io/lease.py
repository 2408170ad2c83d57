"""Leases: a file that names the process that works on a task.

A lease is taken over when its holder is dead. Commits are atomic and results deterministic, so a lease only saves
duplicate work; correctness does not depend on it.
"""

import errno
import fcntl
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from jax_selftrain.io.atomic import PathLike, os_errors_as_input_errors, temp_path
from jax_selftrain.io.process_id import ProcessId, is_alive, this_process

_logger = logging.getLogger(__name__)


@contextmanager
def lease(path: PathLike, *, stale_after: float = 600.0) -> Iterator[bool]:
    """Try to acquire the lease `path` without waiting; yield True if acquired.

    A thread of the holder touches the file every `stale_after / 10` seconds, and the lease is removed at the end. It is
    taken over when the holder is a dead process of this machine, or when the file was not touched for `stale_after`
    seconds (processes of other machines cannot be checked). The folder is locked during a takeover, so that one process
    wins. On a file system without locks two processes may win, which costs duplicate work only.
    """
    path = Path(path)
    content = json.dumps({**asdict(this_process()), "token": uuid.uuid4().hex}).encode()
    if not _acquire(path, content, stale_after):
        yield False
        return

    def touch() -> None:
        with suppress(OSError):  # a transient fault of a network file system; the next call comes in time
            if path.read_bytes() == content:  # else another process took over while this one was suspended
                os.utime(path)

    try:
        with repeat_in_thread(touch, stale_after / 10, f"lease {path.name}"):
            yield True
    finally:
        _release(path, content)


@contextmanager
def repeat_in_thread(action: Callable[[], object], seconds: float, name: str) -> Iterator[None]:
    """Call an action every `seconds` in a thread while inside."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(seconds):
            action()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def wait_for_lease(path: PathLike, *, resource: str = "") -> Iterator[None]:
    """Hold a lease; wait while another process holds it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    is_waiting = False
    while True:
        with lease(path) as is_held:
            if is_held:
                yield
                return
        if resource and not is_waiting:
            _logger.info("waiting for another process that uses %s", resource)
        is_waiting = True
        time.sleep(0.5)


def _acquire(path: Path, content: bytes, stale_after: float) -> bool:
    fresh = temp_path(path, "tmp")
    with os_errors_as_input_errors(path, fresh), _lock_folder(path.parent):
        _create(fresh, content)
        try:
            if _publish(fresh, path, content):
                return True
            if not _is_stale(path, now=fresh.stat().st_mtime, stale_after=stale_after):
                return False
            os.replace(fresh, path)
            return True
        finally:
            fresh.unlink(missing_ok=True)


def _release(path: Path, content: bytes) -> None:
    with suppress(FileNotFoundError), _lock_folder(path.parent):  # the folder or the lease may have been removed
        if path.read_bytes() == content:  # else another process took over while this one was suspended
            path.unlink()


def _is_stale(path: Path, *, now: float, stale_after: float) -> bool:
    """Return True if another process may take over (`now`: file system's clock)."""
    try:
        if now - path.stat().st_mtime > stale_after:
            return True
        data = json.loads(path.read_bytes())
        holder = ProcessId(data["host"], data["scope"], data["pid"], data["start_time"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False  # just released, being written, or truncated by a crash: only its age counts
    return is_alive(holder) is False


def _publish(fresh: Path, path: Path, content: bytes) -> bool:
    """Give a written file the lease's name unless it is taken.

    A hard link has its content at once, so that a process that dies here leaves no lease without a holder.
    """
    try:
        os.link(fresh, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        with suppress(FileExistsError):
            _create(path, content)
            return True
        return False
    return True


def _create(path: Path, content: bytes) -> None:
    with open(path, "xb", buffering=0) as stream:
        try:
            stream.write(content)
        except OSError:
            path.unlink()
            raise


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
                raise  # these mean that the file system has no locks, see `lease`
        yield
    finally:
        os.close(descriptor)  # also releases the lock
