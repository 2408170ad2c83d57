"""The study: self-training rounds, the matrix of sources and students, their statistics and reports, a little world."""

from jax_selftrain.study.comparison import compare
from jax_selftrain.study.evaluate import evaluation_hooks, train
from jax_selftrain.study.matrix import study
from jax_selftrain.study.reports.comparison_table import comparison_table
from jax_selftrain.study.reports.report import report
from jax_selftrain.study.results import collect
from jax_selftrain.study.round import run
from jax_selftrain.study.worlds.demo import demo
from jax_selftrain.study.worlds.parts import World, WorldConfig
from jax_selftrain.study.worlds.world import make_world

__all__ = [
    "World",
    "WorldConfig",
    "collect",
    "compare",
    "comparison_table",
    "demo",
    "evaluation_hooks",
    "make_world",
    "report",
    "run",
    "study",
    "train",
]
