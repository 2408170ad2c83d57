"""Settings that a search tries: shapes of the mesh, and what may be chosen without changing what is computed.

Training keeps its batch (it is part of the recipe) and is cut into more or fewer micro-batches; sampling and scoring
take more or fewer rows at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from jax_selftrain.config import SampleConfig, TrainConfig
from jax_selftrain.planning.hardware import Topology
from jax_selftrain.planning.stage_programs import StageConfig

BATCH_SIZES = (16, 32, 64, 128, 256, 512)
"""Of each replica, in sampling."""
BATCH_TOKENS = (2048, 4096, 8192, 16384)
"""Of each replica, in scoring."""
MODEL_AXES = (1, 2, 4, 8)
"""Degrees of tensor parallelism."""


def candidate_settings(config: StageConfig, machine: Topology) -> Iterator[list[StageConfig]]:
    """For each shape of the mesh, legal or not, settings from those that need least memory to those that need most."""
    chips = machine.chips if isinstance(config, TrainConfig) else machine.chips_per_host
    for model_axis in (n for n in MODEL_AXES if chips % n == 0):
        data = chips // model_axis
        placed = replace(config, mesh=f"data={data},model={model_axis}")
        if isinstance(placed, SampleConfig):
            yield [replace(placed, batch_size=rows) for rows in BATCH_SIZES]
        elif isinstance(placed, TrainConfig):
            rows = placed.batch_size // data  # of a step on each replica; where there is not one, none is legal
            halves = [n for n in range(max(rows, 1), 0, -1) if max(rows, 1) % n == 0 and n & (n - 1) == 0]
            yield [replace(placed, grad_accum=n) for n in halves]
        else:
            yield [replace(placed, batch_tokens=tokens * data) for tokens in BATCH_TOKENS]
