"""Candidate settings of a search: mesh shapes and batch sizes.

Training keeps its batch size and varies the number of micro-batches. Sampling and scoring vary their batch size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from jax_selftrain.config import SampleConfig, TrainConfig
from jax_selftrain.planning.hardware import Topology
from jax_selftrain.planning.stage_programs import StageConfig

BATCH_SIZES = (16, 32, 64, 128, 256, 512)
"""Slots on each replica in sampling."""
BATCH_TOKENS = (2048, 4096, 8192, 16384)
"""Tokens on each replica in scoring."""
MODEL_AXES = (1, 2, 4, 8)
"""Degrees of tensor parallelism."""


def candidate_settings(config: StageConfig, topology: Topology) -> Iterator[list[StageConfig]]:
    """Yield the settings of each mesh shape, in order of memory."""
    chips = topology.chips if isinstance(config, TrainConfig) else topology.chips_per_host
    for model_axis in (n for n in MODEL_AXES if chips % n == 0):
        data = chips // model_axis
        candidate = replace(config, mesh=f"data={data},model={model_axis}")
        if isinstance(candidate, SampleConfig):
            yield [replace(candidate, batch_size=rows) for rows in BATCH_SIZES]
        elif isinstance(candidate, TrainConfig):
            rows = max(candidate.batch_size // data, 1)  # with fewer rows than replicas every setting is invalid
            powers_of_two = [n for n in range(rows, 0, -1) if rows % n == 0 and n & (n - 1) == 0]
            yield [replace(candidate, grad_accum=n) for n in powers_of_two]
        else:
            yield [replace(candidate, batch_tokens=tokens * data) for tokens in BATCH_TOKENS]
