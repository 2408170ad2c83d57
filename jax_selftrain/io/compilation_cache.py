"""The folder in which JAX keeps compiled programs."""

import hashlib
import os
import platform
from pathlib import Path


def enable_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, by default.

    A home folder can be shared by machines of several kinds: each kind of processor has its own folder.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "jax_selftrain" / f"compiled-{_cpu_model()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a read-only home folder
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2 << 30))


def _cpu_model() -> str:
    """Hash the processor's model and instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kind = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join([platform.machine(), *kind]).encode()).hexdigest()[:8]
