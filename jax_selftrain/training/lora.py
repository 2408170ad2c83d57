"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685).

The adapter of a kernel W [L, outputs…, inputs…] is a pair A [L, inputs…, r], B [L, r, outputs…]; the effective kernel
is W + (alpha / r) · A B. The tree of adapters mirrors that of the parameters, with `lora_a` and `lora_b` in place of
the kernel. The forward pass multiplies by both factors in turn; only an exported model contains their product.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_selftrain.config import TrainConfig
from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.errors import InputError
from jax_selftrain.io.rng import make_rng
from jax_selftrain.models import DecoderConfig, Params, abstract_params
from jax_selftrain.models.params import param_axes

NUM_OUTPUT_DIMS = {
    ("attn", "q"): 3,
    ("attn", "k"): 2,
    ("attn", "v"): 2,
    ("attn", "o"): 1,
    ("mlp", "gate"): 1,
    ("mlp", "up"): 1,
    ("mlp", "down"): 1,
}
"""Kernels that can have adapters, with their number of output dimensions (after the layer dimension)."""


def check_lora(config: TrainConfig) -> None:
    """Refuse unusable LoRA targets, and a model that is not trained."""
    known = [name for _, name in NUM_OUTPUT_DIMS]
    for target in config.lora_targets:
        if target not in known:
            raise InputError(f"--lora-targets {target}: is no matrix of a layer; choose from {', '.join(known)}")
    if config.lora_rank and not config.lora_targets:
        raise InputError("--lora-targets: is empty; --lora-rank needs at least one matrix")
    if config.lora_rank and config.init == "scratch":
        raise InputError(f"--lora-rank {config.lora_rank}: needs a trained model, not --init scratch")


def check_lora_targets(config: TrainConfig, model: DecoderConfig) -> None:
    """Refuse LoRA targets if the model has none of them."""
    layers = abstract_params(model)["layers"]
    present = [name for group, name in NUM_OUTPUT_DIMS if name in layers[group]]
    if config.lora_rank and not {*config.lora_targets} & {*present}:
        targets = " ".join(config.lora_targets)
        raise InputError(
            f"--lora-targets {targets}: {config.model} has no such matrix; choose from {', '.join(present)}"
        )


def init_adapters(config: TrainConfig, model: DecoderConfig, rules: ShardingRules) -> Params:
    """Initialize float32 adapters for `config.lora_targets`.

    A is uniform within ±(inputs)^-½, as in the authors' code, and B is zero, so that the initial model is the base. The
    values are a function of (seed, path), the same on every mesh.
    """

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        _, group, name, factor = (key.key for key in path)
        bound = prod(leaf.shape[1:-1]) ** -0.5 if factor == "lora_a" else 0.0

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            uniform = make_rng("initial adapters", config.seed, f"{group}/{name}").random(leaf.shape, np.float32)
            return (bound * (2 * uniform - 1)).astype(np.float32)[index or ()]

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, read)

    return jax.tree_util.tree_map_with_path(fill, abstract_adapters(config, model, rules))


def abstract_adapters(config: TrainConfig, model: DecoderConfig, rules: ShardingRules) -> Params:
    """Return the adapters as shapes and shardings."""
    shapes, axes = abstract_params(model)["layers"], param_axes(model)["layers"]
    struct, rank = rules.abstract_array, config.lora_rank
    layers: Params = {}
    for (group, name), outputs in NUM_OUTPUT_DIMS.items():
        if name in config.lora_targets and name in shapes[group]:
            (depth, *sizes), (layer_axis, *names) = shapes[group][name]["kernel"].shape, axes[group][name]["kernel"]
            layers.setdefault(group, {})[name] = {
                "lora_a": struct((depth, *sizes[outputs:], rank), jnp.float32, (layer_axis, *names[outputs:], None)),
                "lora_b": struct((depth, rank, *sizes[:outputs]), jnp.float32, (layer_axis, None, *names[:outputs])),
            }
    return {"layers": layers}


def apply_adapters(config: TrainConfig, base: Params, adapters: Params) -> Params:
    """Add the adapters to the parameters for the forward pass."""

    def add(weights: Params, pair: Params, scale: float) -> Params:
        return weights | {"lora_a": pair["lora_a"], "lora_b": scale * pair["lora_b"]}

    return _map_adapted(add, config, base, adapters)


def merge_adapters(config: TrainConfig, base: Params, adapters: Params) -> Params:
    """Merge the adapters into the kernels of the base."""

    def merge(weights: Params, pair: Params, scale: float) -> Params:
        return weights | {"kernel": weights["kernel"] + scale * _lora_delta(pair, weights["kernel"])}

    return _map_adapted(merge, config, base, adapters)


def _map_adapted(
    function: Callable[[Params, Params, float], Params], config: TrainConfig, base: Params, adapters: Params
) -> Params:
    layers = {group: dict(weights) for group, weights in base["layers"].items()}
    for group, names in adapters["layers"].items():
        for name, pair in names.items():
            layers[group][name] = function(layers[group][name], pair, config.lora_alpha / config.lora_rank)
    return base | {"layers": layers}


def _lora_delta(pair: Params, kernel: jax.Array) -> jax.Array:
    """Multiply A by B, into the shape and sharding of the kernel."""
    a, b = pair["lora_a"], pair["lora_b"]
    inputs, outputs = "dgrk"[: a.ndim - 2], "xyzw"[: b.ndim - 2]
    equation = f"l{inputs}s,ls{outputs}->l{outputs}{inputs}"
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum(equation, a, b, precision=precision, out_sharding=jax.typeof(kernel).sharding)
