"""Memory, traffic and collectives of a program by formula, where it is not compiled: for GPUs, and before a search.

What arrays a program is handed is exact (`traced.bytes_on_a_chip`); what it needs besides is estimated here from the
few arrays that are large, and is called an estimate wherever it is shown. The memory model in words stands in
docs/pods.md.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from jax_selftrain.config import SampleConfig, TrainConfig
from jax_selftrain.likelihood.batching import PROJECTION_CHUNK
from jax_selftrain.models import TAIL_LEN, DecoderConfig, abstract_params
from jax_selftrain.planning.hlo_cost import Collective
from jax_selftrain.planning.jaxpr_flops import per_device_bytes
from jax_selftrain.planning.stage_programs import StageProgram
from jax_selftrain.training.loss import LOGITS_BYTES


def param_bytes(model: DecoderConfig) -> tuple[int, int, int]:
    """Parameters of all layers, of the embedding, and of an output matrix of its own."""
    params = abstract_params(model)
    count = {name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}
    return count["layers"], count["embed"], count.get("head", 0)


def activation_bytes(program: StageProgram, model: DecoderConfig) -> int:
    """An estimate of the bytes that the program needs beside its arguments, on each chip."""
    config, model_axis = program.config, program.mesh_shape["model"]
    width, heads, compute = model.hidden_size, model.num_heads, np.dtype(config.dtype).itemsize
    if isinstance(config, SampleConfig):
        logits = 4 * config.batch_size * model.vocab_size * 4  # logits, what is masked of them, and the tree's sums
        layer = param_bytes(model)[0] * compute // model.num_layers // model_axis
        return logits + layer
    rows, length = (
        program.abstract_args[-1].tokens.shape[-2:]
        if isinstance(config, TrainConfig)
        else program.abstract_args[3].shape
    )
    rows //= program.mesh_shape["data"]
    length -= isinstance(config, TrainConfig)
    hidden = rows * length * width * 4
    fused = isinstance(config, TrainConfig) and program.machine.chip.platform == "tpu" and config.dtype == "bfloat16"
    scores = 0 if fused else 3 * rows * heads // model_axis * length * length * 4
    mlp = 2 * rows * length * model.intermediate_size // model_axis * 4
    if not isinstance(config, TrainConfig):
        return 6 * hidden + scores + mlp + 2 * PROJECTION_CHUNK * model.vocab_size * 4 // model_axis
    layers, embedding, head = param_bytes(model)
    gradient = per_device_bytes(program.abstract_args[0].params, tile_padded=False)
    output = (head or embedding) // model_axis
    kept = {"full": hidden, "dots": hidden + 2 * rows * length * (4 * width + 2 * model.intermediate_size) * compute}
    activations = model.num_layers * kept.get(config.remat, 8 * hidden + mlp)
    gathered = embedding * 4 + output * (4 + compute) if program.mesh_shape["data"] > 1 else output * 4
    layer = 3 * layers // model.num_layers // model_axis * compute
    return gradient + activations + gathered + layer + 6 * hidden + scores + mlp + 4 * LOGITS_BYTES


def hbm_traffic(work: StageProgram, model: DecoderConfig) -> float:
    """Bytes that each chip must read and write at least: weights, state, and the cache as far as it is filled."""
    config, compute = work.config, np.dtype(work.config.dtype).itemsize
    if isinstance(config, SampleConfig):
        params, cache = work.abstract_args[0], work.abstract_args[2].cache
        weights = per_device_bytes(params, tile_padded=False) - per_device_bytes(params["embed"], tile_padded=False) * (
            not model.tie_word_embeddings
        )
        settled = per_device_bytes((cache.k, cache.v, cache.k_scale, cache.v_scale), tile_padded=False)
        page = per_device_bytes((cache.page_k, cache.page_v), tile_padded=False)
        return TAIL_LEN * (weights + settled * work.dynamic_turns[1] * cache.block / cache.capacity + page)
    if isinstance(config, TrainConfig):
        state = work.abstract_args[0]
        used = sum(param_bytes(model)) * compute // work.mesh_shape["model"]
        return 2 * per_device_bytes(state, tile_padded=False) + 3 * used * config.grad_accum
    return float(per_device_bytes(work.abstract_args[0], tile_padded=False))


def collectives(work: StageProgram, model: DecoderConfig) -> list[Collective]:
    """What chips exchange in training by data (`fsdp`): the formula of the docs, for a step of M micro-batches.

    For each micro-batch, all layers are gathered in the compute type, before and after the loss, the embedding in
    float32 and the output matrix in the compute type; gradients are scattered in float32. Parameters along `model` are
    counted where they lie. With `replicated`, gradients are added up instead. Sampling and scoring by data exchange
    nothing. What a model axis adds is not told.
    """
    config, data, model_axis = work.config, work.mesh_shape["data"], work.mesh_shape["model"]
    if not isinstance(config, TrainConfig) or data == 1:
        return []
    layers, embedding, head = (count / model_axis for count in param_bytes(model))
    compute, micro = np.dtype(config.dtype).itemsize, config.grad_accum
    if config.preset != "fsdp":
        return [Collective("all-reduce", data, 4.0 * micro * (layers + embedding + head), micro)]
    output = head or embedding
    gathered = micro * (2.0 * layers * compute + 4.0 * embedding + output * compute)
    scattered = 4.0 * micro * (layers + embedding + output)
    return [Collective("all-gather", data, gathered, micro), Collective("reduce-scatter", data, scattered, micro)]


def nbytes(arrays: Any, work: StageProgram) -> int:
    """Bytes of a tree of arrays on each chip of the work's machine."""
    return per_device_bytes(arrays, tile_padded=work.machine.chip.platform == "tpu")
