"""What a stage takes on a machine, before the machine is there: memory, time, tokens and chip-hours.

For a TPU slice the very program that the stage would run is compiled for it by libtpu, on any computer; memory for
temporaries and code, traffic and collectives are read from what the compiler made. Arguments and results follow from
shapes and shardings, floating-point operations from the program's trace; both are predicted, and where the program was
compiled the prediction of memory stands beside the compiler's number. Without a compiler (GPUs, `--no-compile`) the
rest is estimated (`pods.arithmetic`) and marked so.

Time is that of the roofline: the longest of computing at the chip's peak, moving the traffic at its memory's bandwidth,
and receiving what collectives send. No program reaches it; it is what to compare a measurement with, and a lower bound
on chip-hours.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from jax_selftrain.planning.stage_programs import StageConfig, StageProgram, config_of, stage_program
from jax_selftrain.version import versions


@dataclass(frozen=True)
class Memory:
    """Bytes on each chip."""

    arguments: int
    """Parameters, state, batch: predicted from shapes and shardings."""
    outputs: int
    """Results, predicted; those that take their arguments' place (donated) included."""
    aliased: int
    """Outputs in place of arguments: those donated, or, where it was compiled, what the compiler made of it."""
    temporaries: int
    """From the compiler, or estimated."""
    code: int
    """The program itself, from the compiler; 0 where it was not compiled."""
    compiled_arguments: int | None = None
    """What the compiler says of `arguments`."""
    compiled_outputs: int | None = None
    """What the compiler says of `outputs`."""

    @property
    def total(self) -> int:
        """What a chip must hold at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def plan_memory(config: PlanConfig) -> dict[str, Any]:
    """Plan stages of a model on machines; best in a process of its own, since JAX is told to use no accelerator in it.

    Returns:
      `{"model": …, "rows": [one for each stage, machine and, in a search, setting]}`; see `row_of`.

    Raises:
      InputError: options, machine, mesh or model do not go together, or libtpu is missing.
    """
    yaml_io.require(config)
    jax.config.update("jax_platforms", "cpu")  # a plan computes nothing, and a TPU that is there may be busy
    machines = [parse_topology(name) for name in config.topology]
    rows = []
    for stage in config.stage:
        ref = config.source or config.model if stage == "sample" else config.model
        with config_only_folder(ref) as folder:
            for machine in machines:
                rows += _rows(config, stage, machine, folder)
    result = {"model": config.model, "versions": versions(), "rows": rows}
    if config.out:
        atomic.write_json(config.out, result)
    return result


def _rows(config: PlanConfig, stage: str, machine: Topology, folder: str) -> list[dict[str, Any]]:
    chosen = config_of(config, stage, folder)
    model = hub.open_model(folder).config
    if not config.search:
        return [row_of(config, stage, machine, chosen, model)]
    found: list[dict[str, Any]] = []
    refused: InputError | None = None
    for settings_of_one_mesh in candidate_settings(chosen, machine):
        try:
            for setting in settings_of_one_mesh:  # from small to large
                row = row_of(config, stage, machine, setting, model)
                found.append(row)
                if not row["fits"]:
                    break
        except InputError as error:  # this mesh does not divide the model or the batch
            refused = error
    if refused is not None and not found:
        raise refused
    return sorted(found, key=lambda row: (not row["fits"], -row["tokens_per_second"]))


def row_of(
    config: PlanConfig, stage: str, machine: Topology, setting: StageConfig, model: DecoderConfig
) -> dict[str, Any]:
    """One program on one machine; all numbers are per chip but for tokens and chip-hours.

    Raises:
      InputError: see `plan`.
    """
    compiles = config.compile and machine.chip.platform == "tpu"
    work = stage_program(config, stage, machine, setting, compile=compiles)
    with mesh_context(work.mesh):
        traced = jax.jit(work.function, donate_argnums=work.donate_argnums).trace(*work.abstract_args)
    operations = flops_by_dtype(traced.jaxpr, work.dynamic_turns)
    donated = [leaf for index in work.donate_argnums for leaf in jax.tree.leaves(work.abstract_args[index])]
    memory = Memory(
        arguments=cost_model.nbytes(work.abstract_args, work),
        outputs=cost_model.nbytes(traced.jaxpr.out_avals, work),
        aliased=cost_model.nbytes(donated, work),
        temporaries=cost_model.activation_bytes(work, model),
        code=0,
    )
    traffic, exchanged = cost_model.hbm_traffic(work, model), cost_model.collectives(work, model)
    seconds, too_large = None, ""
    if compiles:
        began = time.perf_counter()
        try:
            # What is compiled for devices that are not there could not be read back.
            with mesh_context(work.mesh), no_compilation_cache():
                compiled = traced.lower().compile()
        except JaxRuntimeError as error:
            too_large = _too_large(error)
        else:
            memory = _from_memory_analysis(memory, compiled)
            text = HloModule(compiled.as_text(), work.dynamic_turns)
            traffic, exchanged = text.traffic, text.collectives()
        seconds = time.perf_counter() - began
    return _row(work, memory, operations, traffic, exchanged, too_large, seconds)


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


def _too_large(error: JaxRuntimeError) -> str:
    """What the compiler says of a program that does not fit. Any other failure of its is raised again."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        raise error
    used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) (\w+)", text)
    return f"the compiler needs {used[1]}iB of {used[2]}iB {used[3]}" if used else "the compiler finds no room for it"


def _row(
    work: StageProgram,
    memory: Memory,
    operations: dict[str, float],
    traffic: float,
    exchanged: list[Collective],
    too_large: str,
    compile_seconds: float | None,
) -> dict[str, Any]:
    chip, compiled = work.machine.chip, memory.compiled_arguments is not None
    parts = {
        "compute": sum(count / chip.flops(dtype) for dtype, count in operations.items()),
        "memory": traffic / chip.bandwidth,
        "network": sum(one.bytes_received for one in exchanged) / chip.ici_bandwidth,
    }
    limit = max(parts, key=parts.__getitem__)
    speed = work.tokens_per_execution * work.num_meshes / parts[limit]
    hours = None if work.total_tokens is None else work.total_tokens / speed * work.machine.chips / 3600
    return {
        "stage": work.stage,
        "topology": work.machine.name,
        "chips": work.machine.chips,
        "mesh": dict(work.mesh_shape),
        "meshes": work.num_meshes,
        "setting": _settings_key(work.config),
        "unit": work.execution_name,
        "assumption": work.assumptions,
        "compiled": compiled,
        "compile_seconds": compile_seconds,
        "memory": {
            "arguments": memory.arguments,
            "outputs": memory.outputs,
            "reused": memory.aliased,
            "temporaries": memory.temporaries,
            "code": memory.code,
            "total": memory.total,
            "of": chip.hbm_bytes,
            "compiled_arguments": memory.compiled_arguments,
            "compiled_outputs": memory.compiled_outputs,
        },
        "fits": not too_large and memory.total <= chip.hbm_bytes,
        "too_large": too_large,
        "flops": sum(operations.values()),
        "traffic": traffic,
        "collectives": [
            {
                "kind": one.kind,
                "chips": one.participants,
                "runs": one.runs,
                "bytes": one.bytes,
                "received": one.bytes_received,
            }
            for one in exchanged
        ],
        "seconds": parts,
        "limit": limit,
        "tokens_per_second": speed,
        "tokens": work.total_tokens,
        "chip_hours": hours,
    }


def _settings_key(config: StageConfig) -> dict[str, Any]:
    """The options that decide memory and time."""
    names = ["dtype", "preset"]
    if isinstance(config, SampleConfig):
        names += ["batch_size", "max_tokens", "decode_schedule", "cache_dtype"]
    elif isinstance(config, TrainConfig):
        names += ["batch_size", "grad_accum", "seq_len", "remat"]
    else:
        names += ["batch_tokens"]
    return {name: getattr(config, name) for name in names}


_COLUMNS = (
    *("stage", "machine", "mesh", "setting", "arguments", "temporaries", "in all", "fits"),
    *("TFLOP", "traffic", "received", "limit", "tokens/s ≤", "tokens", "chip-hours ≥"),
)


def table(result: dict[str, Any]) -> str:
    """The plan as Markdown, and what it takes for granted."""
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
    yield shape + (f" × {row['meshes']}" if row["meshes"] > 1 else "")
    yield ", ".join(f"{name} {value}" for name, value in row["setting"].items() if value is not None)
    yield _gib(memory["arguments"])
    yield sign + _gib(memory["temporaries"])
    yield f"{sign}{_gib(memory['total'])} of {_gib(memory['of'])}"
    yield "yes" if row["fits"] else "NO"
    yield f"{row['flops'] / 1e12:,.3g}"
    yield f"{sign}{_gib(row['traffic'])}"
    received = sum(one["received"] for one in row["collectives"])
    yield f"{sign}{_gib(received)}" if received else "—"
    yield row["limit"]
    yield f"{row['tokens_per_second']:,.3g}" if row["tokens_per_second"] < 1000 else f"{row['tokens_per_second']:,.0f}"
    yield "—" if row["tokens"] is None else f"{row['tokens']:,}"
    yield "—" if row["chip_hours"] is None else f"{row['chip_hours']:,.3g}"


def _notes(row: dict[str, Any]) -> Iterator[str]:
    yield (
        "memory, traffic and what is received: GiB on each chip, as is TFLOP, for one execution of the program; "
        "speed and chip-hours: at the roofline, which no program reaches"
    )
    yield f"{row['stage']}: one execution is {row['unit']}" + (f"; {row['assumption']}" if row["assumption"] else "")
    if not row["compiled"]:
        yield "~: estimated by formula, not compiled; arguments and TFLOP are exact"
    if row["too_large"]:
        yield f"{row['stage']} on {row['topology']}: {row['too_large']}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}" if size >= 0.005 * GIB else f"{size / GIB:.1g}"
