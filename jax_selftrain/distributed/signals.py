"""SIGTERM and SIGABRT, whose handlers may be in C or in Python."""

import ctypes
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def sigterm_handler(on_sigterm: Callable[[], object]) -> Iterator[None]:
    """Call `on_sigterm` on SIGTERM while inside, then restore the previous handler.

    The previous handler may be in C: JAX's, for preemption notices. Outside the main thread this does nothing, since
    only the main thread receives signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    c_handler = libc().signal(signal.SIGTERM, signal.SIG_IGN)
    python_handler = signal.signal(signal.SIGTERM, lambda number, frame: on_sigterm())
    try:
        yield
    finally:
        if callable(python_handler):
            signal.signal(signal.SIGTERM, python_handler)
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            libc().signal(signal.SIGTERM, c_handler)


@contextmanager
def sigterm_event() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets, in the main thread."""
    received = threading.Event()
    with sigterm_handler(received.set):
        yield received


def libc() -> Any:
    """Return the C library, with the types of `signal` declared."""
    library = ctypes.CDLL(None)
    library.signal.restype, library.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    return library
