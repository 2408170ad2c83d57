"""Memory, traffic and collectives of a program by formula.

Bytes of arguments are exact (`jaxpr_flops.per_device_bytes`). Temporaries are estimated from the few large arrays;
docs/pods.md describes the memory model.
"""

from __future__ import annotations

import math

import jax
import numpy as np

from jax_selftrain.config import SampleConfig, TrainConfig
from jax_selftrain.likelihood.batching import PROJECTION_CHUNK
from jax_selftrain.models import DecoderConfig, abstract_params
from jax_selftrain.models.kv_cache import TAIL_LEN
from jax_selftrain.planning.hlo_cost import Collective
from jax_selftrain.planning.jaxpr_flops import per_device_bytes
from jax_selftrain.planning.stage_programs import StageProgram
from jax_selftrain.training.loss import LOGITS_BYTES


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
        program.abstract_args[-1].tokens.shape[-2:]
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


def collectives(program: StageProgram, model: DecoderConfig) -> list[Collective]:
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
