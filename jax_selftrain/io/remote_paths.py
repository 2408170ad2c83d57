"""Paths of the local copies of objects in remote storage.

Separate from `remote`, so that records can name URIs instead of folders of one machine.
"""

import os
import re
from pathlib import Path


def remote_cache_dir() -> Path:
    """Return the folder of local copies.

    It holds `in/SCHEME/…` (inputs), `out/SCHEME/…` (outputs) and `mount/SCHEME/…` (outputs of several processes).
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "jax_selftrain", "mirror")


def restore_uris(text: str) -> str:
    """Replace paths of local copies in a text by their URIs."""
    local = re.escape(str(remote_cache_dir()))
    return re.sub(rf"{local}/(?:in|out|mount)/(\w+)/", lambda found: f"{found[1]}://{'/' * (found[1] == 'file')}", text)
