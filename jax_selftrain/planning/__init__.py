"""Planning for machines that are not there: compilation ahead of time for TPU slices, memory, time and chip-hours."""

from jax_selftrain.planning.planner import plan_memory, table
from jax_selftrain.planning.pythia_shapes import PYTHIA_SHAPES, neox_config

__all__ = ["PYTHIA_SHAPES", "neox_config", "plan_memory", "table"]
