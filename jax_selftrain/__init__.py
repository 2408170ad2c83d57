"""Can a language model get better by training on text it sampled from itself, and whose text can it learn from?

The public functions, one per stage of the straight line model → corpus → model → scores → report. They are
imported when first used (PEP 562), so that `import jax_selftrain` and `jax-selftrain --help` stay instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_selftrain.hub import load_model
    from jax_selftrain.sampling import sample
    from jax_selftrain.scoring import extract
    from jax_selftrain.scoring.score import score
    from jax_selftrain.study import run, train

__version__ = "0.1.0"

__all__ = ["__version__", "extract", "load_model", "run", "sample", "score", "train"]

_ROOMS = {
    "extract": "scoring",
    "load_model": "hub",
    "run": "study",
    "sample": "sampling",
    "score": "scoring",
    "train": "study",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
