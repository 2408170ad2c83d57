"""Memory, time and chip-hours of stages, by compilation or formula."""

from jax_selftrain.planning.planner import PYTHIA_SHAPES, neox_config, plan_memory, table

__all__ = ["PYTHIA_SHAPES", "neox_config", "plan_memory", "table"]
