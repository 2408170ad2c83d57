"""Self-training of language models on text that they sample from themselves.

One public function for each stage: model → corpus → model → scores → report. A function is imported at its first use
(PEP 562), so that `import jax_selftrain` and `jax-selftrain --help` are fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jax_selftrain.version import __version__

if TYPE_CHECKING:
    from jax_selftrain.evals import extract
    from jax_selftrain.evals.score import score
    from jax_selftrain.hub import load_model
    from jax_selftrain.sampling import sample
    from jax_selftrain.study import run
    from jax_selftrain.study import train_with_evals as train

__all__ = ["__version__", "extract", "load_model", "run", "sample", "score", "train"]

_LAZY_FUNCTIONS = {
    "extract": "evals:extract",
    "load_model": "hub:load_model",
    "run": "study:run",
    "sample": "sampling:sample",
    "score": "evals:score",
    "train": "study:train_with_evals",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY_FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, function = _LAZY_FUNCTIONS[name].partition(":")
    value = getattr(import_module(f"{__name__}.{module}"), function)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
