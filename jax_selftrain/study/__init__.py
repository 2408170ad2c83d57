"""Studies of sources and students; a run has one cell."""

from jax_selftrain.study.compare import compare
from jax_selftrain.study.eval_hooks import evaluation_hooks, train_with_evals
from jax_selftrain.study.run_study import run, run_study

__all__ = ["compare", "evaluation_hooks", "run", "run_study", "train_with_evals"]
