"""Optional logging to Weights & Biases (`--wandb PROJECT`).

The W&B id of a run is its fingerprint, so that a resumed run continues its W&B run. W&B accepts each step once and in
order, so that repeated steps of a resumed run are not logged twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from jax_selftrain.errors import InputError


class WandbTracker:
    """A run at Weights & Biases."""

    def __init__(self, project: str, run: Path, *, identity: str, config: Mapping[str, Any]):
        """Start or resume the W&B run.

        Args:
          project: W&B project.
          run: run folder.
          identity: fingerprint of the run.
          config: options to log.

        Raises:
          InputError: W&B refuses, for instance without a login.
        """
        wandb = _package()
        try:
            self._run = wandb.init(
                project=project, id=identity[:32], resume="allow", name=run.name, dir=str(run), config=dict(config)
            )
        except wandb.Error as error:
            raise InputError(f"--wandb {project}: {error}; correct this, or omit the option") from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step, by name."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


def check_tracking(project: str) -> None:
    """Check that the package is installed if there is a project.

    Raises:
      InputError: the package is missing; says how to install it.
    """
    if project:
        _package()


def _package() -> Any:
    try:
        return import_module("wandb")
    except ImportError as error:
        raise InputError(
            "--wandb needs the package wandb, which is not installed: pip install 'jax-selftrain[wandb]', or omit the "
            "option"
        ) from error
