"""Stages of runs, for tests that read their folders."""

from __future__ import annotations

from jax_selftrain.config import RunConfig
from jax_selftrain.study.design import Design, make_design
from jax_selftrain.study.run_study import one_cell_study


def run_design(config: RunConfig) -> Design:
    """Return the design of a run, with the folders of its stages."""
    return make_design(one_cell_study(config))
