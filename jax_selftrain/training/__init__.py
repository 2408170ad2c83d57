"""Training: loss, step, checkpoints, and the run that resumes exactly."""

from jax_selftrain.training.flops import flops_per_token
from jax_selftrain.training.hooks import Hook, check_hooks
from jax_selftrain.training.loop import train
from jax_selftrain.training.loss import Batch, LossSums, Penalties, objective
from jax_selftrain.training.run_folder import CHANGEABLE, check_ranges
from jax_selftrain.training.step import TrainState, program
from jax_selftrain.training.tracking import check_tracking

__all__ = [
    "CHANGEABLE",
    "Batch",
    "Hook",
    "LossSums",
    "Penalties",
    "TrainState",
    "check_hooks",
    "check_ranges",
    "check_tracking",
    "flops_per_token",
    "objective",
    "program",
    "train",
]
