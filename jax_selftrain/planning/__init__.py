"""Memory, time and chip-hours of stages, by compilation or formula."""

from jax_selftrain.planning.planner import plan_memory, table
from jax_selftrain.planning.pythia_shapes import PYTHIA_SHAPES, neox_config

__all__ = ["PYTHIA_SHAPES", "neox_config", "plan_memory", "table"]
