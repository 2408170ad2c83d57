"""Memory, time and chip-hours of a stage on an unavailable machine.

For a TPU slice, libtpu compiles the program of the stage on any computer; temporaries, code, memory traffic and
collectives are read from the compiled program. Arguments and outputs follow from shapes and shardings, floating-point
operations from the jaxpr. Without a compiler (GPUs, `--no-compile`) the rest is estimated (`stage_programs`).

Time is the roofline: the longest of compute at the chip's peak, memory traffic at its bandwidth, and collectives at the
bandwidth of its links. It is a lower bound of time and chip-hours.
"""

import json
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
from jax.errors import JaxRuntimeError

from jax_selftrain import hub
from jax_selftrain.config import PlanConfig, SampleConfig, TrainConfig, fill_options, yaml_io
from jax_selftrain.distributed.mesh import mesh_context, no_compilation_cache
from jax_selftrain.errors import InputError
from jax_selftrain.io import json_files
from jax_selftrain.models import DecoderConfig
from jax_selftrain.planning.hardware import GIB, Topology, parse_topology
from jax_selftrain.planning.hlo_cost import Collective, HloModule
from jax_selftrain.planning.jaxpr_flops import flops_by_dtype, per_device_bytes
from jax_selftrain.planning.stage_programs import (
    StageConfig,
    StageProgram,
    activation_bytes,
    collective_bytes,
    hbm_traffic,
    stage_program,
)
from jax_selftrain.version import versions

BATCH_SIZES = (16, 32, 64, 128, 256, 512)
"""Slots on each replica in sampling."""
BATCH_TOKENS = (2048, 4096, 8192, 16384)
"""Tokens on each replica in scoring."""
MODEL_AXES = (1, 2, 4, 8)
"""Degrees of tensor parallelism."""
PYTHIA_SHAPES = {
    "pythia-14m": (6, 128, 4, 50304),
    "pythia-31m": (6, 256, 8, 50304),
    "pythia-70m": (6, 512, 8, 50304),
    "pythia-160m": (12, 768, 12, 50304),
    "pythia-410m": (24, 1024, 16, 50304),
    "pythia-1b": (16, 2048, 8, 50304),
    "pythia-1.4b": (24, 2048, 16, 50304),
    "pythia-2.8b": (32, 2560, 32, 50304),
    "pythia-6.9b": (32, 4096, 32, 50432),
    "pythia-12b": (36, 5120, 40, 50688),
}
"""Layers, hidden size, heads and vocabulary size of the Pythia models (EleutherAI/pythia, `models/*/*.yml`)."""
_OPTIONS = {
    "sample": ("batch_size", "max_tokens", "cache_dtype"),
    "train": ("batch_size", "grad_accum", "seq_len", "remat"),
    "score": ("batch_tokens",),
}
"""Options that change memory and time, with dtype and preset."""


def neox_config(layers: int, width: int, heads: int, vocabulary: int = 50304) -> dict[str, Any]:
    """Return the `config.json` of a Pythia model with this shape."""
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "vocab_size": vocabulary,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "max_position_embeddings": 2048,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


@contextmanager
def config_only_folder(ref: str) -> Iterator[str]:
    """Yield the model, or a folder with a Pythia config.

    Names of Pythia models: `pythia-1b`, `EleutherAI/pythia-1b-deduped`.

    Raises InputError if the name is neither a folder nor a Pythia model.
    """
    name = ref.removeprefix("EleutherAI/").partition("@")[0].removesuffix("-deduped")
    if Path(ref).exists() or (name not in PYTHIA_SHAPES and "/" in ref):
        yield ref
        return
    if name not in PYTHIA_SHAPES:
        hint = yaml_io.did_you_mean(name, PYTHIA_SHAPES) or f"; known names are {', '.join(PYTHIA_SHAPES)}"
        raise InputError(f"--model {ref}: no such folder or Pythia model{hint}")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(neox_config(*PYTHIA_SHAPES[name])))
        yield folder


def plan_memory(config: PlanConfig) -> dict[str, Any]:
    """Plan stages of a model on topologies.

    JAX uses only the CPU in this process afterwards.

    Returns `{"model": …, "rows": […]}`, one row for each stage, topology and, with `search`, setting; see `plan_stage`.
    Raises InputError if options, topology, mesh or model are invalid, or libtpu is missing.
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
        json_files.write_json(config.out, result)
    return result


def _plan_settings(config: PlanConfig, stage: str, topology: Topology, folder: str) -> list[dict[str, Any]]:
    options: StageConfig = fill_options(config, getattr(config, stage), folder)
    model = hub.open_model(folder).config
    if not config.search:
        return [plan_stage(config, stage, topology, options, model)]
    rows: list[dict[str, Any]] = []
    refusal: InputError | None = None
    for settings in _candidate_settings(options, topology):
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


def _candidate_settings(config: StageConfig, topology: Topology) -> Iterator[list[StageConfig]]:
    """Yield the settings of each mesh shape, in order of memory.

    Training keeps its batch size and varies the number of micro-batches.
    """
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


def plan_stage(
    config: PlanConfig, stage: str, topology: Topology, setting: StageConfig, model: DecoderConfig
) -> dict[str, Any]:
    """Plan one program on one topology.

    Returns:
      Memory, operations, traffic and collectives of each chip for one execution; tokens and chip-hours of the stage.
      Memory in bytes: `arguments`, `outputs` (predicted, with those in donated buffers), `aliased` (outputs in buffers
      of arguments), `temporaries`, `code`, `total`, `hbm`; `compiled_arguments` and `compiled_outputs` are None if the
      program was not compiled.

    Raises:
      InputError: see `plan_memory`.
    """
    compiles = config.compile and topology.chip.platform == "tpu"
    program = stage_program(config, stage, topology, setting, compile=compiles)
    with mesh_context(program.mesh):
        traced = jax.jit(program.function, donate_argnums=program.donate_argnums).trace(*program.abstract_args)
    donated = [program.abstract_args[index] for index in program.donate_argnums]
    padded = topology.chip.platform == "tpu"
    memory: dict[str, Any] = {
        "arguments": per_device_bytes(program.abstract_args, tile_padded=padded),
        "outputs": per_device_bytes(traced.jaxpr.out_avals, tile_padded=padded),
        "aliased": per_device_bytes(donated, tile_padded=padded),
        "temporaries": activation_bytes(program, model),
        "code": 0,
        "compiled_arguments": None,
        "compiled_outputs": None,
    }
    traffic, collectives = hbm_traffic(program, model), collective_bytes(program, model)
    compile_seconds, too_large = None, ""
    if compiles:
        start = time.perf_counter()
        try:
            # Programs for other devices cannot be loaded from the compilation cache.
            with mesh_context(program.mesh), no_compilation_cache():
                compiled: Any = traced.lower().compile()
        except JaxRuntimeError as error:
            too_large = _describe_out_of_memory(error)
        else:
            found = compiled.memory_analysis()
            memory |= {
                "aliased": found.alias_size_in_bytes,
                "temporaries": found.temp_size_in_bytes,
                "code": found.generated_code_size_in_bytes,
                "compiled_arguments": found.argument_size_in_bytes,
                "compiled_outputs": found.output_size_in_bytes,
            }
            module = HloModule(compiled.as_text(), program.loop_trip_counts)
            traffic, collectives = module.traffic, module.collectives()
        compile_seconds = time.perf_counter() - start
    flops = flops_by_dtype(traced.jaxpr, program.loop_trip_counts)
    row = _to_row(program, flops, traffic, collectives)
    total = sum(memory[part] for part in ("arguments", "outputs", "temporaries", "code")) - memory["aliased"]
    return row | {
        "compiled": memory["compiled_arguments"] is not None,
        "compile_seconds": compile_seconds,
        "memory": {**memory, "total": total, "hbm": topology.chip.hbm_bytes},
        "fits": not too_large and total <= topology.chip.hbm_bytes,
        "too_large": too_large,
    }


def _describe_out_of_memory(error: JaxRuntimeError) -> str:
    """Return the compiler's message about memory; raise any other error again."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        raise error
    found = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) (\w+)", text)
    return f"the compiler needs {found[1]}iB of {found[2]}iB {found[3]}" if found else "the compiler is out of memory"


def _to_row(
    program: StageProgram, flops: dict[str, float], traffic: float, collectives: list[Collective]
) -> dict[str, Any]:
    """Return the program, and its time by the roofline."""
    chip, chips, total = program.topology.chip, program.topology.chips, program.total_tokens
    seconds = {
        "compute": sum(count / chip.flops(dtype) for dtype, count in flops.items()),
        "memory": traffic / chip.bandwidth,
        "network": sum(one.bytes_received for one in collectives) / chip.ici_bandwidth,
    }
    bound = max(seconds, key=seconds.__getitem__)
    speed = program.tokens_per_execution * program.num_meshes / seconds[bound]
    return {
        "stage": program.stage,
        "topology": program.topology.name,
        "chips": chips,
        "mesh": dict(program.mesh.shape),
        "num_meshes": program.num_meshes,
        "options": {name: getattr(program.config, name) for name in ("dtype", "preset", *_OPTIONS[program.stage])},
        "execution": program.execution_name,
        "assumptions": program.assumptions,
        "flops": sum(flops.values()),
        "traffic": traffic,
        "collectives": [{**asdict(one), "bytes_received": one.bytes_received} for one in collectives],
        "roofline_seconds": seconds,
        "bound": bound,
        "tokens_per_second": speed,
        "total_tokens": total,
        "chip_hours": None if total is None else total / speed * chips / 3600,
    }


def table(result: dict[str, Any]) -> str:
    """Format a plan as a Markdown table with notes."""
    rows = [_format_row(row) for row in result["rows"]]
    lines = [f"| {' | '.join(cells)} |" for cells in (rows[0], *(row.values() for row in rows))]
    notes = dict.fromkeys(note for row in result["rows"] for note in _notes(row))
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:], "", *(f"* {note}" for note in notes)])


def _format_row(row: dict[str, Any]) -> dict[str, str]:
    memory, sign = row["memory"], "" if row["compiled"] else "~"
    shape = ",".join(f"{axis}={size}" for axis, size in row["mesh"].items())
    received = sum(one["bytes_received"] for one in row["collectives"])
    speed, tokens, hours = row["tokens_per_second"], row["total_tokens"], row["chip_hours"]
    return {
        "stage": row["stage"],
        "topology": row["topology"],
        "mesh": shape + (f" × {row['num_meshes']}" if row["num_meshes"] > 1 else ""),
        "options": ", ".join(f"{name} {value}" for name, value in row["options"].items() if value is not None),
        "arguments": _gib(memory["arguments"]),
        "temporaries": sign + _gib(memory["temporaries"]),
        "total": f"{sign}{_gib(memory['total'])} of {_gib(memory['hbm'])}",
        "fits": "yes" if row["fits"] else "NO",
        "TFLOP": f"{row['flops'] / 1e12:,.3g}",
        "traffic": f"{sign}{_gib(row['traffic'])}",
        "received": f"{sign}{_gib(received)}" if received else "—",
        "bound": row["bound"],
        "tokens/s ≤": f"{speed:,.3g}" if speed < 1000 else f"{speed:,.0f}",
        "tokens": "—" if tokens is None else f"{tokens:,}",
        "chip-hours ≥": "—" if hours is None else f"{hours:,.3g}",
    }


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
