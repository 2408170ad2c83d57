"""Programs of each stage on a topology, and their cost by formula.

The programs are the stages' own, on a mesh of the topology's chips, so a plan agrees with the code that runs. Sampling
and scoring use a mesh of one host's chips if a replica fits on them, and every host has such a mesh. Training uses all
chips. Bytes of arguments are exact (`jaxpr_flops.per_device_bytes`). Temporaries are estimated from the few large
arrays; docs/pods.md describes the memory model.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from jax_selftrain import likelihood, sampling, training
from jax_selftrain.config import PlanConfig, SampleConfig, ScoreConfig, TrainConfig
from jax_selftrain.distributed.mesh import AXES, make_mesh, parse_mesh
from jax_selftrain.errors import InputError
from jax_selftrain.likelihood.batching import PROJECTION_CHUNK
from jax_selftrain.models import DecoderConfig, abstract_params
from jax_selftrain.models.kv_cache import TAIL_LEN
from jax_selftrain.planning.hardware import Topology, topology_devices
from jax_selftrain.planning.hlo_cost import Collective
from jax_selftrain.planning.jaxpr_flops import per_device_bytes
from jax_selftrain.training.loss import LOGITS_BYTES

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

    Raises InputError if options, model or mesh are invalid on this topology.
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
    epochs = config.epochs or 1
    steps = config.steps or max(1, epochs * sample.samples * sample.max_tokens // tokens)
    count = "one epoch" if epochs == 1 else f"{epochs} epochs"
    epoch = f"{count} of {sample.samples:,} samples with the maximum of tokens: {steps:,} steps"
    return {
        "loop_trip_counts": (),
        "execution_name": f"a step of {config.batch_size} rows with {config.seq_len} tokens",
        "tokens_per_execution": tokens,
        "total_tokens": steps * tokens,
        "assumptions": "" if config.steps else epoch,
    }


def _make_abstract_mesh(topology: Topology, shape: dict[str, int]) -> AbstractMesh:
    return AbstractMesh(
        tuple(shape[axis] for axis in AXES),
        AXES,
        axis_types=(AxisType.Explicit,) * len(AXES),
        abstract_device=AbstractDevice(topology.chip.device_kind, 1, topology.chip.platform),
    )


def param_counts(model: DecoderConfig) -> tuple[int, int, int]:
    """Count the parameters of layers, embedding and separate output matrix."""
    params = abstract_params(model)
    count = {name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}
    return count["layers"], count["embed"], count.get("head", 0)


def activation_bytes(program: StageProgram, model: DecoderConfig) -> int:
    """Estimate the temporary bytes of a program on each chip."""
    config, model_axis = program.config, program.mesh.shape["model"]
    width, heads, compute = model.hidden_size, model.num_heads, np.dtype(config.dtype).itemsize
    if isinstance(config, SampleConfig):
        logits = 4 * config.batch_size * model.vocab_size * 4  # logits, warped logits, and partial sums of the sampler
        layer = param_counts(model)[0] * compute // model.num_layers // model_axis
        return logits + layer
    rows, length = (
        program.abstract_args[1].tokens.shape[-2:]
        if isinstance(config, TrainConfig)
        else program.abstract_args[3].shape
    )
    rows //= program.mesh.shape["data"]
    length -= isinstance(config, TrainConfig)
    hidden = rows * length * width * 4
    fused = isinstance(config, TrainConfig) and program.topology.chip.platform == "tpu" and config.dtype == "bfloat16"
    scores = 0 if fused else 3 * rows * heads // model_axis * length * length * 4
    mlp = 2 * rows * length * model.intermediate_size // model_axis * 4
    if not isinstance(config, TrainConfig):
        return 6 * hidden + scores + mlp + 2 * PROJECTION_CHUNK * model.vocab_size * 4 // model_axis
    layers, embedding, head = param_counts(model)
    gradient = per_device_bytes(program.abstract_args[0].params)
    output = (head or embedding) // model_axis
    kept = {"full": hidden, "dots": hidden + 2 * rows * length * (4 * width + 2 * model.intermediate_size) * compute}
    activations = model.num_layers * kept.get(config.remat, 8 * hidden + mlp)
    gathered = embedding * 4 + output * (4 + compute) if program.mesh.shape["data"] > 1 else output * 4
    layer = 3 * layers // model.num_layers // model_axis * compute
    return gradient + activations + gathered + layer + 6 * hidden + scores + mlp + 4 * LOGITS_BYTES


def hbm_traffic(program: StageProgram, model: DecoderConfig) -> float:
    """Return the minimum memory traffic of each chip in bytes."""
    config, compute = program.config, np.dtype(program.config.dtype).itemsize
    if isinstance(config, SampleConfig):
        params, cache = program.abstract_args[0], program.abstract_args[2].cache
        weights = per_device_bytes(params) - per_device_bytes(params["embed"]) * (not model.tie_word_embeddings)
        committed = per_device_bytes(cache.committed)
        tail = per_device_bytes(cache.tail)
        filled = program.loop_trip_counts[1] * cache.block_size / cache.capacity
        return TAIL_LEN * (weights + committed * filled + tail)
    if isinstance(config, TrainConfig):
        state = program.abstract_args[0]
        compute_bytes = sum(param_counts(model)) * compute // program.mesh.shape["model"]
        return 2 * per_device_bytes(state) + 3 * compute_bytes * config.grad_accum
    return float(per_device_bytes(program.abstract_args[0]))


def collective_bytes(program: StageProgram, model: DecoderConfig) -> list[Collective]:
    """Return the collectives of data-parallel training, as in docs/pods.md.

    With `fsdp`, each micro-batch all-gathers the layers in the compute type before and after the loss, the embedding in
    float32 and the output matrix in the compute type; gradients are reduce-scattered in float32. Parameters sharded
    along `model` count per shard. With `replicated`, gradients are all-reduced. Sampling and scoring along `data` have
    no collectives. Collectives of the model axis are not included.
    """
    config, data, model_axis = program.config, program.mesh.shape["data"], program.mesh.shape["model"]
    if not isinstance(config, TrainConfig) or data == 1:
        return []
    layers, embedding, head = (count / model_axis for count in param_counts(model))
    compute, micro = np.dtype(config.dtype).itemsize, config.grad_accum
    if config.preset != "fsdp":
        return [Collective("all-reduce", data, 4.0 * micro * (layers + embedding + head), micro)]
    output = head or embedding
    gathered = micro * (2.0 * layers * compute + 4.0 * embedding + output * compute)
    scattered = 4.0 * micro * (layers + embedding + output)
    return [Collective("all-gather", data, gathered, micro), Collective("reduce-scatter", data, scattered, micro)]
