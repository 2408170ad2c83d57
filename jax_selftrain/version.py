"""Versions of this package and of libraries that change its numbers."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Return the versions of this package and of its numerical libraries."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    found = {"jax_selftrain": __version__, "python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "pyarrow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # optional dependencies
    return found
