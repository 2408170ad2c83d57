"""Training: loss, step, checkpoints, and the run that resumes exactly."""

from jax_selftrain.training.checkpoints import best_step, read_curve
from jax_selftrain.training.flops import flops_per_token
from jax_selftrain.training.gradient_alignment import align_gradients
from jax_selftrain.training.hooks import Hook, check_hooks
from jax_selftrain.training.loop import check_train_config, train
from jax_selftrain.training.step import abstract_train_step

__all__ = [
    "Hook",
    "abstract_train_step",
    "align_gradients",
    "best_step",
    "check_hooks",
    "check_train_config",
    "flops_per_token",
    "read_curve",
    "train",
]
