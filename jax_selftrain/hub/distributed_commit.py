"""One folder committed by all processes of a program: the writer of each file is agreed, the rename happens once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax

from jax_selftrain.distributed import barrier, broadcast_one_to_all
from jax_selftrain.io import atomic


@contextmanager
def commit_from_all_processes(path: str | Path) -> Iterator[Path]:
    """`storage.commit_folder` for every process at once: all get the same temporary folder, process 0 renames it.

    With one process it is `storage.commit_folder` itself. Otherwise all processes must come here, with the same path
    on a file system that all of them see.

    Raises:
      InputError: on every process, when process 0 cannot make the folder.
    """
    if jax.process_count() == 1:
        with atomic.commit_folder(path) as aside:
            yield aside
        return
    with ExitStack() as stack:
        yield Path(broadcast_one_to_all(lambda: str(stack.enter_context(atomic.commit_folder(path)).absolute())))
        barrier(f"written {path}")
    barrier(f"committed {path}")
