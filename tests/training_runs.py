"""What the tests of training share: the options of a small run, and the bits of its result."""

import json
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_selftrain.config import TrainConfig
from jax_selftrain.hub import LoadedModel, load_model
from jax_selftrain.training import Hook


class Interruption(Exception):
    """Interrupts a run in the middle."""


def interrupt(step: int, model: LoadedModel) -> None:
    """Interrupt the run; the function of a hook."""
    raise Interruption


def run_options(at: tuple[Path, Path, Path], **changes: Any) -> TrainConfig:
    """A run of a few steps on two devices; `at` is (model, corpus, run folder)."""
    model, corpus, out = at
    values: dict[str, Any] = {
        "model": str(model),
        "corpus": str(corpus),
        "out": str(out),
        "steps": 6,
        "batch_size": 8,
        "seq_len": 48,
        "learning_rate": 1e-3,
        "checkpoint_every": 2,
        "mesh": "data=2",
    }
    return TrainConfig(**{**values, **changes})


def weights(model: Path | str) -> dict[str, bytes]:
    """The bits of every parameter of a model."""
    leaves = jax.tree_util.tree_leaves_with_path(load_model(model, "data=1").params)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def losses(run: Path) -> list[float]:
    """The loss of every step."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def _erratic(step: int, model: LoadedModel) -> dict[str, float]:
    """A number in [0, 1) that another last bit of the weights changes altogether."""
    return {"probe/loss": zlib.crc32(np.asarray(model.params["layers"]["mlp"]["up"]["kernel"]).tobytes()) / 2**32}


def probe(every: int) -> Hook:
    """Measures `probe/loss`, which is best at a step that nobody can foresee."""
    return Hook(
        _erratic, every=every, run_at_start_and_end=True, metric_names=("probe/loss",), measured={"probe": "weights"}
    )
