"""The micro-world: synthetic worlds, small models of them, and the demo."""

from jax_selftrain.experiments.microworld.demo import demo
from jax_selftrain.experiments.microworld.world import make_world
from jax_selftrain.experiments.microworld.world_types import World, WorldConfig

__all__ = ["World", "WorldConfig", "demo", "make_world"]
