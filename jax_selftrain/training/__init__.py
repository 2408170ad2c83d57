"""Training: loss, step, checkpoints, and the run that resumes exactly."""

from jax_selftrain.training.loop import Hook, train
from jax_selftrain.training.loss import Batch, LossSums, loss_sums
from jax_selftrain.training.run_folder import CHANGEABLE
from jax_selftrain.training.step import TrainState, program

__all__ = ["CHANGEABLE", "Batch", "Hook", "LossSums", "TrainState", "loss_sums", "program", "train"]
