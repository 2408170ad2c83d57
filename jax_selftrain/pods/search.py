"""Settings that a search tries: shapes of the mesh, and what may be chosen without changing what is computed.

Training keeps its batch (it is part of the recipe) and is cut into more or fewer micro-batches; sampling and scoring
take more or fewer rows at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from jax.sharding import AbstractMesh, AxisType

from jax_selftrain.config import SampleConfig, TrainConfig
from jax_selftrain.errors import InputError
from jax_selftrain.mesh import AXES, make_layout
from jax_selftrain.models import DecoderConfig, axis_sizes
from jax_selftrain.pods.hardware import Machine
from jax_selftrain.pods.stages import StageConfig

ROWS = (16, 32, 64, 128, 256, 512)
"""Of each replica, in sampling."""
BATCH_TOKENS = (2048, 4096, 8192, 16384)
"""Of each replica, in scoring."""
LARGEST_MODEL_AXIS = 8


def candidates(config: StageConfig, machine: Machine, model: DecoderConfig) -> Iterator[list[StageConfig]]:
    """For each legal shape of the mesh, settings from those that need least memory to those that need most."""
    chips = machine.chips if isinstance(config, TrainConfig) else machine.chips_per_host
    for model_axis in (n for n in (1, 2, 4, 8) if n <= LARGEST_MODEL_AXIS and chips % n == 0):
        data = chips // model_axis
        if not _divides(config, data, model_axis, model):
            continue
        placed = replace(config, mesh=f"data={data},model={model_axis}")
        if isinstance(placed, SampleConfig):
            yield [replace(placed, batch_size=rows) for rows in ROWS]
        elif isinstance(placed, TrainConfig):
            rows = placed.batch_size // data
            if placed.batch_size % data == 0:
                yield [replace(placed, grad_accum=n) for n in range(rows, 0, -1) if rows % n == 0 and n & (n - 1) == 0]
        else:
            yield [replace(placed, batch_tokens=tokens * data) for tokens in BATCH_TOKENS]


def _divides(config: StageConfig, data: int, model_axis: int, model: DecoderConfig) -> bool:
    mesh = AbstractMesh((data, model_axis), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    try:
        make_layout(config.preset, mesh, axis_sizes(model))  # type: ignore[arg-type]
    except InputError:
        return False
    return not (config.preset == "replicated" and model_axis > 1)
