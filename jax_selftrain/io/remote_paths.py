"""Where the local folders lie that stand for addresses in object storage (`remote`), and which address each stands for.

Apart from `remote`, so that what writes records can name addresses in them instead of folders of one machine.
"""

from __future__ import annotations

import os
import re
from pathlib import Path


def remote_cache_dir() -> Path:
    """The folder that holds them: `in/SCHEME/…` of what is read, `out/SCHEME/…` of what is written,
    `mount/SCHEME/…` of what several processes write."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "jax_selftrain", "mirror")


def restore_uris(text: str) -> str:
    """The text with addresses in place of the folders that stand for them."""
    local = re.escape(str(remote_cache_dir()))
    return re.sub(rf"{local}/(?:in|out|mount)/(\w+)/", lambda found: f"{found[1]}://{'/' * (found[1] == 'file')}", text)
