"""SIGTERM and SIGABRT, where handlers in C stand beside those of Python."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def sigterm_handler(on_sigterm: Callable[[], object]) -> Iterator[None]:
    """Call `listener` on SIGTERM while inside; afterwards whatever listened before does so again.

    That may be a handler in C: JAX's, of preemption notices. Signals reach the main thread only, so that in another
    one nothing is listened to.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = libc().signal(signal.SIGTERM, signal.SIG_IGN)
    previous = signal.signal(signal.SIGTERM, lambda number, frame: on_sigterm())
    try:
        yield
    finally:
        if callable(previous):
            signal.signal(signal.SIGTERM, previous)
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            libc().signal(signal.SIGTERM, before)


def libc() -> Any:
    """C's own `signal`."""
    library = ctypes.CDLL(None)
    library.signal.restype, library.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    return library
