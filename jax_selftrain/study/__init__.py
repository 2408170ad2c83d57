"""Studies of sources and students: design, stages, run, results, claims, proxies, memorization."""

from jax_selftrain.study.compare import compare
from jax_selftrain.study.eval_hooks import evaluation_hooks, train_with_evals
from jax_selftrain.study.results import collect_round
from jax_selftrain.study.round import run
from jax_selftrain.study.run_study import run_study

__all__ = ["collect_round", "compare", "evaluation_hooks", "run", "run_study", "train_with_evals"]
