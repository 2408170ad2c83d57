"""Planning for machines that are not there: compilation ahead of time for TPU slices, memory, time and chip-hours."""

from jax_selftrain.pods.known import PYTHIA, neox_config
from jax_selftrain.pods.planner import plan, table

__all__ = ["PYTHIA", "neox_config", "plan", "table"]
