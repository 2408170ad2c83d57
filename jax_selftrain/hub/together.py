"""One folder committed by all processes of a program: the writer of each file is agreed, the rename happens once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from jax_selftrain import storage
from jax_selftrain.errors import InputError

_MESSAGE_BYTES = 4096


@contextmanager
def commit_together(path: str | Path) -> Iterator[Path]:
    """`storage.commit_folder` for every process at once: all get the same temporary folder, process 0 renames it.

    With one process it is `storage.commit_folder` itself. Otherwise all processes must come here, with the same path
    on a file system that all of them see.

    Raises:
      InputError: on every process, when process 0 cannot make the folder.
    """
    if jax.process_count() == 1:
        with storage.commit_folder(path) as aside:
            yield aside
        return
    with ExitStack() as stack:
        place = refusal = ""
        if jax.process_index() == 0:
            try:
                place = str(stack.enter_context(storage.commit_folder(path)).absolute())
            except InputError as error:  # said on every process below: one that stayed silent would be waited for
                refusal = str(error)
        place, refusal = from_process_0(place), from_process_0(refusal)
        if refusal:
            raise InputError(refusal)
        yield Path(place)
        multihost_utils.sync_global_devices(f"written {path}")
    multihost_utils.sync_global_devices(f"committed {path}")


def from_process_0(text: str) -> str:
    """A short text (4 kB of UTF-8 at most) that process 0 has, on every process; all must come here."""
    if jax.process_count() == 1:
        return text
    data = text.encode()[:_MESSAGE_BYTES]
    padded = np.frombuffer(data.ljust(_MESSAGE_BYTES, b"\0"), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes().rstrip(b"\0").decode(errors="replace")
