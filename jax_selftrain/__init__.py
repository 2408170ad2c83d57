"""Self-training of language models on text that they sample from themselves.

One public function for each stage: model → corpus → model → scores → report. A function is imported at its first use
(PEP 562), so that `import jax_selftrain` and `jax-selftrain --help` are fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jax_selftrain.version import __version__

if TYPE_CHECKING:
    from jax_selftrain.corpus import import_text, open_corpus
    from jax_selftrain.evals import extract
    from jax_selftrain.evals.score import score
    from jax_selftrain.hub import convert, load_model, merge
    from jax_selftrain.likelihood import loglikelihoods
    from jax_selftrain.report import write_report
    from jax_selftrain.sampling import sample
    from jax_selftrain.study import run
    from jax_selftrain.study import train_with_evals as train

__all__ = [
    "__version__",
    "convert",
    "extract",
    "import_text",
    "load_model",
    "loglikelihoods",
    "merge",
    "open_corpus",
    "run",
    "sample",
    "score",
    "train",
    "write_report",
]

_LAZY_FUNCTIONS = {
    "convert": "hub:convert",
    "extract": "evals:extract",
    "import_text": "corpus:import_text",
    "load_model": "hub:load_model",
    "loglikelihoods": "likelihood:loglikelihoods",
    "merge": "hub:merge",
    "open_corpus": "corpus:open_corpus",
    "run": "study:run",
    "sample": "sampling:sample",
    "score": "evals:score",
    "train": "study:train_with_evals",
    "write_report": "report:write_report",
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
