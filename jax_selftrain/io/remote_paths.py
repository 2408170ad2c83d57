"""Paths in records: URIs instead of local copies, relative paths in studies.

Separate from `remote`, so that records do not name folders of one machine.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def remote_cache_dir() -> Path:
    """Return the folder of local copies.

    It holds `in/SCHEME/…` (inputs), `out/SCHEME/…` (outputs) and `mount/SCHEME/…` (outputs of several processes).
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "jax_selftrain", "mirror")


_roots: list[str] = []
"""Folders whose paths are recorded relative to them; global, because checkpoints are written by a thread."""


@contextmanager
def paths_relative_to(folder: Path) -> Iterator[None]:
    """Record paths below an absolute folder relative to it while inside.

    A copy of the folder in another place then has the same bytes.
    """
    _roots.append(str(folder))
    try:
        yield
    finally:
        _roots.remove(str(folder))


def restore_uris(text: str) -> str:
    """Replace paths of local copies in a text by their URIs.

    Paths below a folder of `paths_relative_to` become relative.
    """
    for root in _roots:
        text = re.sub(rf"(?<![\w./-]){re.escape(root)}/", "", text)
    local = re.escape(str(remote_cache_dir()))
    return re.sub(rf"{local}/(?:in|out|mount)/(\w+)/", lambda found: f"{found[1]}://{'/' * (found[1] == 'file')}", text)
