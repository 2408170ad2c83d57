"""Weights & Biases, for those who ask for it (`--wandb PROJECT`); the package is imported only then.

A run keeps its W&B id from launch to launch: the id is the run's own fingerprint. W&B takes each step once and in
order, so that what a resumed run computes again is not shown twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from jax_selftrain.errors import InputError


class WandbTracker:
    """One run at W&B."""

    def __init__(self, project: str, run: Path, *, identity: str, config: Mapping[str, Any]):
        """Begin or resume it; `identity` is the run's fingerprint, `config` what to show beside it.

        Raises:
          InputError: W&B refuses, for instance because nobody is logged in.
        """
        wandb = _package()
        try:
            self._run = wandb.init(
                project=project, id=identity[:32], resume="allow", name=run.name, dir=str(run), config=dict(config)
            )
        except wandb.Error as error:
            raise InputError(f"--wandb {project}: {error}; mend this, or leave the option out") from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step, by name."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def check_tracking(project: str) -> None:
    """Refuse a project where the package is missing. Raises InputError saying how to install it."""
    if project:
        _package()


def _package() -> Any:
    try:
        return import_module("wandb")
    except ImportError as error:
        raise InputError(
            "--wandb needs the package wandb, which is not installed: pip install 'jax-selftrain[wandb]', or leave the "
            "option out"
        ) from error
