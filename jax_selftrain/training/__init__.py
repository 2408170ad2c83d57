"""Training: loss, step, checkpoints, and the run that resumes exactly."""

from jax_selftrain.training.flops import flops_per_token
from jax_selftrain.training.hooks import Hook, check_hooks
from jax_selftrain.training.loop import train
from jax_selftrain.training.loss import Batch, LossStats, loss_fn
from jax_selftrain.training.run_folder import check_ranges
from jax_selftrain.training.step import TrainState, abstract_train_step
from jax_selftrain.training.wandb_tracker import check_tracking

__all__ = [
    "Batch",
    "Hook",
    "LossStats",
    "TrainState",
    "abstract_train_step",
    "check_hooks",
    "check_ranges",
    "check_tracking",
    "flops_per_token",
    "loss_fn",
    "train",
]
