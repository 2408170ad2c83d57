"""Helpers of the training tests: options and losses of small runs."""

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_selftrain.config import TrainConfig
from jax_selftrain.hub import LoadedModel
from jax_selftrain.io.jsonl import read_log
from jax_selftrain.training import Hook

EVALUATED: dict[str, Any] = {"eval_every": 2, "eval_texts": ("of a hook.jsonl",)}


class Interruption(Exception):
    """Interrupts a run in the middle."""


def interrupt(step: int, model: LoadedModel) -> None:
    """Interrupt the run; the function of a hook."""
    raise Interruption


def run_options(at: tuple[Path, Path, Path], **changes: Any) -> TrainConfig:
    """Return options of a few steps on at most two devices.

    Args:
      at: (model, corpus, run folder).
      changes: other options.
    """
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
        "mesh": f"data={min(2, jax.device_count())}",
    }
    return TrainConfig(**{**values, **changes})


def first_scale(step: int, model: LoadedModel) -> dict[str, float]:
    """Return the sum of a parameter."""
    return {"probe/nll": float(np.asarray(model.params["final_norm"]["scale"], np.float64).sum())}


def measuring(function: Callable[[int, LoadedModel], Mapping[str, float]], **changes: Any) -> Hook:
    options: dict[str, Any] = {
        "every": 2, "run_at_start_and_end": True, "metric_names": ("probe/nll",), "measured": {"probe": "as it is"},
    }  # fmt: skip
    return Hook(function, **{**options, **changes})


def losses(run: Path) -> list[float]:
    """Return the loss of every logged step."""
    return [line["loss"] for line in read_log(run / "metrics.jsonl")]


def curve(run: Path) -> list[dict[str, float]]:
    """Return the evaluations during training."""
    return read_log(run / "curve.jsonl")


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _hash_weights(step: int, model: LoadedModel) -> dict[str, float]:
    """Return a hash of the weights, in [0, 1)."""
    return {"probe/loss": zlib.crc32(np.asarray(model.params["layers"]["mlp"]["up"]["kernel"]).tobytes()) / 2**32}


def probe(every: int) -> Hook:
    """Return a hook that measures `probe/loss`, a hash of the weights."""
    return Hook(
        _hash_weights,
        every=every,
        run_at_start_and_end=True,
        metric_names=("probe/loss",),
        measured={"probe": "weights"},
    )
