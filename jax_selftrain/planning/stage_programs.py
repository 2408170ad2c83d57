"""Programs of each stage on a topology, with their number of executions.

The programs are the stages' own, on a mesh of the topology's chips, so a plan agrees with the code that runs. Sampling
and scoring use a mesh of one host's chips if a replica fits on them, and every host has such a mesh. Training uses all
chips.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from jax_selftrain import likelihood, sampling, training
from jax_selftrain.config import PlanConfig, SampleConfig, ScoreConfig, TrainConfig, common_options
from jax_selftrain.distributed.mesh import AXES, make_mesh, parse_mesh
from jax_selftrain.errors import InputError
from jax_selftrain.likelihood.batching import PROJECTION_CHUNK
from jax_selftrain.models.kv_cache import TAIL_LEN
from jax_selftrain.planning.hardware import Topology, topology_devices

StageConfig = SampleConfig | TrainConfig | ScoreConfig


@dataclass(frozen=True)
class StageProgram:
    """One program of a stage on one mesh."""

    stage: str
    topology: Topology
    config: StageConfig
    mesh: Mesh | AbstractMesh
    num_meshes: int
    """Meshes on the topology that run the program at once."""
    function: Callable[..., Any]
    abstract_args: tuple[Any, ...]
    donate_argnums: tuple[int, ...]
    loop_trip_counts: tuple[float, ...]
    """Trip counts of loops with a dynamic trip count; see `jaxpr_flops.flops`."""
    execution_name: str
    """Description of one execution."""
    tokens_per_execution: int
    """Tokens of one execution on one mesh."""
    total_tokens: int | None
    """Tokens of the whole stage; None if unknown."""
    assumptions: str = ""
    """Assumptions of `total_tokens` and `loop_trip_counts`."""


def stage_program(
    plan: PlanConfig, stage: str, topology: Topology, config: StageConfig, *, compile: bool
) -> StageProgram:
    """Return the program of a stage on a topology.

    Args:
      compile: use the devices of libtpu's description, else an abstract mesh.

    Raises:
      InputError: options, model or mesh are invalid on this topology.
    """
    per_host = stage != "train"
    local_chips = topology.chips_per_host if per_host else topology.chips
    shape = parse_mesh(config.mesh, local_chips)
    size = shape["data"] * shape["model"]
    if stage == "score" and local_chips < size <= topology.chips:
        per_host, local_chips = False, topology.chips
    if size > local_chips:
        host = "one host of " if local_chips < topology.chips else ""
        raise InputError(f"--mesh {config.mesh}: needs {size} chips, but {host}{topology.name} has {local_chips}")
    used = topology.one_host() if per_host else topology
    if compile and per_host:
        topology_devices(topology)  # libtpu must know the whole slice
    mesh: Any = _make_abstract_mesh(used, shape)
    if compile:
        mesh = make_mesh(",".join(f"{axis}={size}" for axis, size in shape.items()), topology_devices(used))
    program: tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]
    facts: dict[str, Any]
    if isinstance(config, SampleConfig):
        program = sampling.abstract_program(config, mesh)
        facts = _sampling_facts(config, shape["data"], program[1][2].cache.block_size)
    elif isinstance(config, TrainConfig):
        program, facts = training.abstract_train_step(config, mesh), _training_facts(config, plan.sample)
    else:
        program = likelihood.scoring_program(config, mesh)
        rows, length = program[1][3].shape
        facts = {
            "loop_trip_counts": (-(-(rows // shape["data"]) * length // PROJECTION_CHUNK),),
            "execution_name": f"a batch of {rows} rows with {length} tokens, all of them targets",
            "tokens_per_execution": rows * length,
            "total_tokens": plan.score_tokens,
        }
    return StageProgram(stage, topology, config, mesh, topology.hosts if per_host else 1, *program, **facts)


def _sampling_facts(config: SampleConfig, replicas: int, block: int) -> dict[str, Any]:
    rows, executions = config.batch_size * replicas, -(-config.max_tokens // TAIL_LEN)
    mean_blocks = sum(-(-index * TAIL_LEN // block) for index in range(executions)) / executions
    return {
        "loop_trip_counts": (1.0, mean_blocks),  # committed blocks of the cache
        "execution_name": f"{TAIL_LEN} tokens in each of {rows} slots",
        "tokens_per_execution": TAIL_LEN * rows,
        "total_tokens": config.samples * config.max_tokens,
        "assumptions": f"every sample has the maximum of {config.max_tokens} tokens",
    }


def _training_facts(config: TrainConfig, sample: SampleConfig) -> dict[str, Any]:
    tokens = config.batch_size * config.seq_len
    steps = config.steps or max(1, sample.samples * sample.max_tokens // tokens)
    epoch = f"one epoch of {sample.samples:,} samples with the maximum of tokens: {steps:,} steps"
    return {
        "loop_trip_counts": (),
        "execution_name": f"a step of {config.batch_size} rows with {config.seq_len} tokens",
        "tokens_per_execution": tokens,
        "total_tokens": steps * tokens,
        "assumptions": "" if config.steps else epoch,
    }


def stage_options(plan: PlanConfig, stage: str, model: str) -> StageConfig:
    """Return the options of a stage with the common options."""
    sections: dict[str, StageConfig] = {"sample": plan.sample, "train": plan.train, "score": plan.score}
    section = sections[stage]
    return replace(section, model=model, **common_options(plan, section))


def _make_abstract_mesh(topology: Topology, shape: dict[str, int]) -> AbstractMesh:
    return AbstractMesh(
        tuple(shape[axis] for axis in AXES),
        AXES,
        axis_types=(AxisType.Explicit,) * len(AXES),
        abstract_device=AbstractDevice(topology.chip.device_kind, 1, topology.chip.platform),
    )
