"""The programs of each stage as they would run on a machine, and what makes their cost the cost of the whole stage.

The programs are the stages' own (`sampling.program`, `training.program`, `scoring.program`), over a mesh of the
machine's chips: a plan cannot drift from what runs. Sampling and scoring take one host's chips wherever a replica fits
on them, and hosts work side by side; training takes all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import AbstractMesh, AxisType, Mesh

from jax_selftrain import likelihood, sampling, training
from jax_selftrain.config import PlanConfig, SampleConfig, ScoreConfig, TrainConfig, common_options
from jax_selftrain.distributed.mesh import AXES, make_mesh, parse_mesh
from jax_selftrain.errors import InputError
from jax_selftrain.likelihood.batching import PROJECTION_CHUNK
from jax_selftrain.models import TAIL_LEN
from jax_selftrain.planning.hardware import Topology, topology_devices

StageConfig = SampleConfig | TrainConfig | ScoreConfig


@dataclass(frozen=True)
class StageProgram:
    """One program of a stage on one mesh."""

    stage: str
    machine: Topology
    config: StageConfig
    mesh_shape: dict[str, int]
    function: Callable[..., Any]
    abstract_args: tuple[Any, ...]
    donate_argnums: tuple[int, ...]
    mesh: Mesh | AbstractMesh
    dynamic_turns: tuple[float, ...]
    """Of loops whose number of turns is a value (see `traced.flops`)."""
    execution_name: str
    """What one execution is."""
    tokens_per_execution: int
    """That one execution handles, on one mesh."""
    num_meshes: int
    """Side by side on the machine."""
    total_tokens: int | None
    """Tokens of the whole stage; None where nothing says how many."""
    assumptions: str
    """What `total` and `dynamic_turns` take for granted."""


def stage_program(
    plan: PlanConfig, stage: str, machine: Topology, config: StageConfig, *, compile: bool
) -> StageProgram:
    """The program of a stage on a machine.

    Args:
      real: over the devices that libtpu describes, to be compiled; else over a mesh that has a shape and no devices.

    Raises:
      InputError: options, model or mesh cannot be used on this machine.
    """
    alone = stage != "train"
    local = machine.chips_per_host if alone else machine.chips
    shape = parse_mesh(config.mesh, local)
    size = shape["data"] * shape["model"]
    together = stage == "score" and local < size <= machine.chips
    available = machine.chips if together else local
    if size > available:
        whose = "one host of" if alone and available < machine.chips else ""
        raise InputError(f"--mesh {config.mesh}: needs {size} chips, but {whose} {machine.name} has {available}")
    on_hosts = alone and not together
    slice_of = machine.one_host() if on_hosts else machine
    if compile and on_hosts:
        topology_devices(machine)  # there must be such a slice
    mesh = _mesh(slice_of, shape) if compile else _abstract_mesh(slice_of, shape)
    meshes = machine.hosts if on_hosts else 1
    common = {"stage": stage, "machine": machine, "config": config, "mesh_shape": shape, "mesh": mesh, "meshes": meshes}
    if isinstance(config, SampleConfig):
        return _sampling(config, mesh, common)
    if isinstance(config, TrainConfig):
        return _training(plan, config, mesh, common)
    return _scoring(plan, config, mesh, common)


def _sampling(config: SampleConfig, mesh: Any, common: dict[str, Any]) -> StageProgram:
    function, arguments, donation = sampling.abstract_program(config, mesh)
    cache = arguments[2].cache
    pages = -(-config.max_tokens // TAIL_LEN)
    blocks = sum(-(-page * TAIL_LEN // cache.block) for page in range(pages)) / pages
    rows = config.batch_size * common["mesh_shape"]["data"]
    return StageProgram(
        function=function,
        abstract_args=arguments,
        donate_argnums=donation,
        dynamic_turns=(1.0, blocks),
        execution_name=f"a page of {TAIL_LEN} tokens in each of {rows} rows",
        tokens_per_execution=TAIL_LEN * rows,
        total_tokens=config.samples * config.max_tokens,
        assumptions=f"every sample runs to its limit of {config.max_tokens} tokens",
        **common,
    )


def _training(plan: PlanConfig, config: TrainConfig, mesh: Any, common: dict[str, Any]) -> StageProgram:
    function, arguments, donation = training.abstract_train_step(config, mesh)
    tokens = config.batch_size * config.seq_len
    corpus = plan.sample.samples * plan.sample.max_tokens
    steps = config.steps or max(1, corpus // tokens)
    assumption = (
        "" if config.steps else f"one pass over {plan.sample.samples:,} samples at their limit: {steps:,} steps"
    )
    return StageProgram(
        function=function,
        abstract_args=arguments,
        donate_argnums=donation,
        dynamic_turns=(),
        execution_name=f"a step of {config.batch_size} rows of {config.seq_len} tokens",
        tokens_per_execution=tokens,
        total_tokens=steps * tokens,
        assumptions=assumption,
        **common,
    )


def _scoring(plan: PlanConfig, config: ScoreConfig, mesh: Any, common: dict[str, Any]) -> StageProgram:
    function, arguments, donation = likelihood.scoring_program(config, mesh)
    rows, length = arguments[3].shape
    return StageProgram(
        function=function,
        abstract_args=arguments,
        donate_argnums=donation,
        dynamic_turns=(math.ceil(rows // common["mesh_shape"]["data"] * length / PROJECTION_CHUNK),),
        execution_name=f"a batch of {rows} rows of {length} tokens, asked about at each",
        tokens_per_execution=rows * length,
        total_tokens=plan.score_tokens,
        assumptions="",
        **common,
    )


def config_of(plan: PlanConfig, stage: str, model: str) -> StageConfig:
    """The options of a stage, with what the plan says for all of them filled in, as a round does it."""
    sections: dict[str, StageConfig] = {"sample": plan.sample, "train": plan.train, "score": plan.score}
    section = sections[stage]
    return replace(section, model=model, **common_options(plan, section))


def _mesh(machine: Topology, shape: dict[str, int]) -> Mesh:
    return make_mesh(",".join(f"{axis}={size}" for axis, size in shape.items()), topology_devices(machine))


def _abstract_mesh(machine: Topology, shape: dict[str, int]) -> AbstractMesh:
    return AbstractMesh(
        tuple(shape[axis] for axis in AXES),
        AXES,
        axis_types=(AxisType.Explicit,) * len(AXES),
        abstract_device=machine.abstract_device,
    )
