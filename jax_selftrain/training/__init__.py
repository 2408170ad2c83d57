"""Training: loss, step, checkpoints, and the run that resumes exactly."""

from jax_selftrain.training.loop import Hook, train
from jax_selftrain.training.loss import Batch, LossSums, Penalties, objective
from jax_selftrain.training.run_folder import CHANGEABLE
from jax_selftrain.training.step import TrainState, program

__all__ = ["CHANGEABLE", "Batch", "Hook", "LossSums", "Penalties", "TrainState", "objective", "program", "train"]
