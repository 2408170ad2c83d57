"""Versions of this package and of the libraries that shape its numbers."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Versions of this package and of the libraries that shape its numbers, without importing them."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    found = {"jax_selftrain": __version__, "python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "pyarrow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # transformers and others are optional where a stage does not need them
    return found
