"""Versions of this package and of libraries that change its numbers."""

import platform
from contextlib import suppress
from functools import cache
from importlib import metadata

__version__ = "0.1.0"


@cache
def versions() -> dict[str, str]:
    """Return the versions of this package and its numerical libraries."""
    found = {"jax_selftrain": __version__, "python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "pyarrow"):
        with suppress(metadata.PackageNotFoundError):  # optional dependencies
            found[name] = metadata.version(name)
    return found
