"""The folder in which compiled programs are kept between test runs."""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of compiled programs for this JAX, processor and set of XLA flags."""
    cpu = [platform.machine()]
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu += sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    key = "\n".join([version("jaxlib"), os.environ.get("XLA_FLAGS", ""), *cpu])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "jax_selftrain" / f"tests-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
