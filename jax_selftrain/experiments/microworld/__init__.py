"""The micro-world: synthetic worlds, small models of them, and the demo."""

from jax_selftrain.experiments.microworld.microworld_study import demo as demo
