"""Memory, time and chip-hours of a stage on an unavailable machine.

For a TPU slice, libtpu compiles the program of the stage on any computer; temporaries, code, memory traffic and
collectives are read from the compiled program. Arguments and outputs follow from shapes and shardings, floating-point
operations from the jaxpr. Without a compiler (GPUs, `--no-compile`) the rest is estimated by formula (`cost_model`).

Time is the roofline: the longest of compute at the chip's peak, memory traffic at its bandwidth, and collectives at the
bandwidth of its links. It is a lower bound of time and chip-hours.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
from jax.errors import JaxRuntimeError

from jax_selftrain import hub
from jax_selftrain.config import PlanConfig, SampleConfig, TrainConfig, yaml_io
from jax_selftrain.distributed.mesh import mesh_context, no_compilation_cache
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.models import DecoderConfig
from jax_selftrain.planning import cost_model
from jax_selftrain.planning.hardware import GIB, Topology, parse_topology
from jax_selftrain.planning.hlo_cost import Collective, HloModule
from jax_selftrain.planning.jaxpr_flops import flops_by_dtype
from jax_selftrain.planning.pythia_shapes import config_only_folder
from jax_selftrain.planning.search import candidate_settings
from jax_selftrain.planning.stage_programs import StageConfig, StageProgram, stage_options, stage_program
from jax_selftrain.version import versions


@dataclass(frozen=True)
class Memory:
    """Bytes on each chip."""

    arguments: int
    """Parameters, state and batch, predicted from shapes and shardings."""
    outputs: int
    """Outputs, predicted, with those in donated buffers."""
    aliased: int
    """Outputs in buffers of arguments: donated, or as compiled."""
    temporaries: int
    """Temporary buffers, compiled or estimated."""
    code: int
    """Code, compiled, or 0."""
    compiled_arguments: int | None = None
    """`arguments` of the compiled program."""
    compiled_outputs: int | None = None
    """`outputs` of the compiled program."""

    @property
    def total(self) -> int:
        """Memory that a chip needs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def plan_memory(config: PlanConfig) -> dict[str, Any]:
    """Plan stages of a model on topologies.

    JAX uses only the CPU in this process afterwards.

    Returns:
      `{"model": …, "rows": […]}`, one row for each stage, topology and, with `search`, setting; see `plan_stage`.

    Raises:
      InputError: options, topology, mesh or model are invalid, or libtpu is missing.
    """
    yaml_io.require(config)
    jax.config.update("jax_platforms", "cpu")  # a plan computes nothing, and another process may use the TPU
    topologies = [parse_topology(name) for name in config.topology]
    rows = []
    for stage in config.stage:
        ref = config.source or config.model if stage == "sample" else config.model
        with config_only_folder(ref) as folder:
            for topology in topologies:
                rows += _plan_settings(config, stage, topology, folder)
    result = {"model": config.model, "versions": versions(), "rows": rows}
    if config.out:
        atomic.write_json(config.out, result)
    return result


def _plan_settings(config: PlanConfig, stage: str, topology: Topology, folder: str) -> list[dict[str, Any]]:
    options = stage_options(config, stage, folder)
    model = hub.open_model(folder).config
    if not config.search:
        return [plan_stage(config, stage, topology, options, model)]
    rows: list[dict[str, Any]] = []
    refusal: InputError | None = None
    for settings in candidate_settings(options, topology):
        try:
            for setting in settings:  # in order of memory
                row = plan_stage(config, stage, topology, setting, model)
                rows.append(row)
                if not row["fits"]:
                    break
        except InputError as error:  # this mesh does not divide the model or the batch
            refusal = error
    if refusal is not None and not rows:
        raise refusal
    return sorted(rows, key=lambda row: (not row["fits"], -row["tokens_per_second"]))


def plan_stage(
    config: PlanConfig, stage: str, topology: Topology, setting: StageConfig, model: DecoderConfig
) -> dict[str, Any]:
    """Plan one program on one topology.

    Returns:
      Memory, operations, traffic and collectives of each chip for one execution; tokens and chip-hours of the stage.

    Raises:
      InputError: see `plan_memory`.
    """
    compiles = config.compile and topology.chip.platform == "tpu"
    program = stage_program(config, stage, topology, setting, compile=compiles)
    with mesh_context(program.mesh):
        traced = jax.jit(program.function, donate_argnums=program.donate_argnums).trace(*program.abstract_args)
    flops = flops_by_dtype(traced.jaxpr, program.loop_trip_counts)
    donated = [leaf for index in program.donate_argnums for leaf in jax.tree.leaves(program.abstract_args[index])]
    memory = Memory(
        arguments=cost_model.nbytes(program.abstract_args, program),
        outputs=cost_model.nbytes(traced.jaxpr.out_avals, program),
        aliased=cost_model.nbytes(donated, program),
        temporaries=cost_model.activation_bytes(program, model),
        code=0,
    )
    traffic, collectives = cost_model.hbm_traffic(program, model), cost_model.collectives(program, model)
    seconds, too_large = None, ""
    if compiles:
        start = time.perf_counter()
        try:
            # Programs for other devices cannot be loaded from the compilation cache.
            with mesh_context(program.mesh), no_compilation_cache():
                compiled = traced.lower().compile()
        except JaxRuntimeError as error:
            too_large = _describe_out_of_memory(error)
        else:
            memory = _from_memory_analysis(memory, compiled)
            module = HloModule(compiled.as_text(), program.loop_trip_counts)
            traffic, collectives = module.traffic, module.collectives()
        seconds = time.perf_counter() - start
    return _to_row(program, memory, flops, traffic, collectives, too_large, seconds)


def _from_memory_analysis(memory: Memory, compiled: Any) -> Memory:
    found = compiled.memory_analysis()
    return replace(
        memory,
        aliased=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
        compiled_arguments=found.argument_size_in_bytes,
        compiled_outputs=found.output_size_in_bytes,
    )


def _describe_out_of_memory(error: JaxRuntimeError) -> str:
    """Return the compiler's message about memory; raise any other error again."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        raise error
    found = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) (\w+)", text)
    return f"the compiler needs {found[1]}iB of {found[2]}iB {found[3]}" if found else "the compiler is out of memory"


def _to_row(
    program: StageProgram,
    memory: Memory,
    flops: dict[str, float],
    traffic: float,
    collectives: list[Collective],
    too_large: str,
    compile_seconds: float | None,
) -> dict[str, Any]:
    chip = program.topology.chip
    seconds = {
        "compute": sum(count / chip.flops(dtype) for dtype, count in flops.items()),
        "memory": traffic / chip.bandwidth,
        "network": sum(one.bytes_received for one in collectives) / chip.ici_bandwidth,
    }
    bound = max(seconds, key=seconds.__getitem__)
    speed = program.tokens_per_execution * program.num_meshes / seconds[bound]
    total, chips = program.total_tokens, program.topology.chips
    return {
        "stage": program.stage,
        "topology": program.topology.name,
        "chips": chips,
        "mesh": dict(program.mesh_shape),
        "num_meshes": program.num_meshes,
        "options": _cost_options(program.config),
        "execution": program.execution_name,
        "assumptions": program.assumptions,
        "compiled": memory.compiled_arguments is not None,
        "compile_seconds": compile_seconds,
        "memory": {**asdict(memory), "total": memory.total, "hbm": chip.hbm_bytes},
        "fits": not too_large and memory.total <= chip.hbm_bytes,
        "too_large": too_large,
        "flops": sum(flops.values()),
        "traffic": traffic,
        "collectives": [{**asdict(one), "bytes_received": one.bytes_received} for one in collectives],
        "roofline_seconds": seconds,
        "bound": bound,
        "tokens_per_second": speed,
        "total_tokens": total,
        "chip_hours": None if total is None else total / speed * chips / 3600,
    }


def _cost_options(config: StageConfig) -> dict[str, Any]:
    """Return the options that change memory and time."""
    names = ["dtype", "preset"]
    if isinstance(config, SampleConfig):
        names += ["batch_size", "max_tokens", "cache_dtype"]
    elif isinstance(config, TrainConfig):
        names += ["batch_size", "grad_accum", "seq_len", "remat"]
    else:
        names += ["batch_tokens"]
    return {name: getattr(config, name) for name in names}


_COLUMNS = (
    *("stage", "topology", "mesh", "options", "arguments", "temporaries", "total", "fits"),
    *("TFLOP", "traffic", "received", "bound", "tokens/s ≤", "tokens", "chip-hours ≥"),
)


def table(result: dict[str, Any]) -> str:
    """Format a plan as a Markdown table with notes."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    notes: dict[str, None] = {}
    for row in result["rows"]:
        lines.append(f"| {' | '.join(_format_row(row))} |")
        notes.update(dict.fromkeys(_notes(row)))
    return "\n".join([*lines, "", *(f"* {note}" for note in notes)])


def _format_row(row: dict[str, Any]) -> Iterator[str]:
    memory, sign = row["memory"], "" if row["compiled"] else "~"
    yield row["stage"]
    yield row["topology"]
    shape = ",".join(f"{axis}={size}" for axis, size in row["mesh"].items())
    yield shape + (f" × {row['num_meshes']}" if row["num_meshes"] > 1 else "")
    yield ", ".join(f"{name} {value}" for name, value in row["options"].items() if value is not None)
    yield _gib(memory["arguments"])
    yield sign + _gib(memory["temporaries"])
    yield f"{sign}{_gib(memory['total'])} of {_gib(memory['hbm'])}"
    yield "yes" if row["fits"] else "NO"
    yield f"{row['flops'] / 1e12:,.3g}"
    yield f"{sign}{_gib(row['traffic'])}"
    received = sum(one["bytes_received"] for one in row["collectives"])
    yield f"{sign}{_gib(received)}" if received else "—"
    yield row["bound"]
    yield f"{row['tokens_per_second']:,.3g}" if row["tokens_per_second"] < 1000 else f"{row['tokens_per_second']:,.0f}"
    yield "—" if row["total_tokens"] is None else f"{row['total_tokens']:,}"
    yield "—" if row["chip_hours"] is None else f"{row['chip_hours']:,.3g}"


def _notes(row: dict[str, Any]) -> Iterator[str]:
    yield (
        "memory, traffic, received: GiB on each chip; TFLOP: on each chip, for one execution of the program; "
        "tokens/s and chip-hours: at the roofline, a bound that no program reaches"
    )
    assumptions = f"; {row['assumptions']}" if row["assumptions"] else ""
    yield f"{row['stage']}: one execution is {row['execution']}{assumptions}"
    if not row["compiled"]:
        yield "~: estimated by formula; arguments and TFLOP are exact"
    if row["too_large"]:
        yield f"{row['stage']} on {row['topology']}: {row['too_large']}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}" if size >= 0.005 * GIB else f"{size / GIB:.1g}"
