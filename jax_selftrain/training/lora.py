"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): a table of paths, and what stands at them.

An adapter of a kernel W [L, outputs…, inputs…] is a pair A [L, inputs…, r], B [L, r, outputs…]; the model then uses
W + (alpha / r) · A B. Its tree mirrors that of the parameters, with `lora_a` and `lora_b` where the kernel stands. The
forward pass multiplies by the factors one after the other; the sum is only formed to deliver a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import jax
import jax.numpy as jnp
import numpy as np

from jax_selftrain.config import TrainConfig
from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.errors import InputError
from jax_selftrain.io.rng import make_rng
from jax_selftrain.models import DecoderConfig, Params, abstract_params, param_axes

NUM_OUTPUT_DIMS = {
    ("attn", "q"): 3,
    ("attn", "k"): 2,
    ("attn", "v"): 2,
    ("attn", "o"): 1,
    ("mlp", "gate"): 1,
    ("mlp", "up"): 1,
    ("mlp", "down"): 1,
}
"""Where adapters may stand in a layer, and how many dimensions of the kernel, after the layers', are outputs."""


def check_lora(config: TrainConfig) -> None:
    """Refuse unknown targets.

    Raises:
      InputError: names the first one, and those there are.
    """
    known = [name for _, name in NUM_OUTPUT_DIMS]
    for target in config.lora_targets:
        if target not in known:
            raise InputError(f"--lora-targets {target}: is no matrix of a layer; choose from {', '.join(known)}")
    if config.lora_rank and not config.lora_targets:
        raise InputError("--lora-targets: is empty, so that --lora-rank would train nothing")
    if config.lora_rank and config.init == "scratch":
        raise InputError(f"--lora-rank {config.lora_rank}: needs a trained model, not --init scratch")


def init_adapters(config: TrainConfig, model: DecoderConfig, rules: ShardingRules) -> Params:
    """Fresh adapters in float32, of whichever of `config.lora_targets` the model has: A uniform within ±(inputs)^-½ as
    in the paper's own code, B zero; the model is at first what it was.

    The numbers are a pure function of (seed, path), the same on every mesh.
    """

    def fill(shape: tuple[int, ...], sharding: jax.sharding.Sharding, path: str, bound: float) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            generator = make_rng("initial adapters", config.seed, path)
            return (bound * (2 * generator.random(shape, np.float32) - 1)).astype(np.float32)[index or ()]

        return jax.make_array_from_callback(shape, sharding, part)

    tree: Params = {}
    for (group, name), a, b in _adapters(config, model, rules):
        bound = prod(a.shape[1:-1]) ** -0.5
        node = tree.setdefault("layers", {}).setdefault(group, {}).setdefault(name, {})
        node["lora_a"] = fill(a.shape, a.sharding, f"{group}/{name}", bound)
        node["lora_b"] = fill(b.shape, b.sharding, f"{group}/{name}", 0.0)
    return tree


def abstract_adapters(config: TrainConfig, model: DecoderConfig, rules: ShardingRules) -> Params:
    """Shapes and shardings of `init_adapters`."""
    tree: Params = {}
    for (group, name), a, b in _adapters(config, model, rules):
        tree.setdefault("layers", {}).setdefault(group, {})[name] = {"lora_a": a, "lora_b": b}
    return tree


def apply_adapters(config: TrainConfig, base: Params, adapters: Params) -> Params:
    """The parameters of the base with the adapters beside their kernels, for the forward pass."""
    scale = config.lora_alpha / config.lora_rank
    layers = {group: dict(weights) for group, weights in base["layers"].items()}
    for group, names in adapters["layers"].items():
        for name, pair in names.items():
            beside = {"lora_a": pair["lora_a"], "lora_b": scale * pair["lora_b"]}
            layers[group][name] = layers[group][name] | beside
    return base | {"layers": layers}


def merge_adapters(config: TrainConfig, base: Params, adapters: Params) -> Params:
    """The base with its adapters added up into the kernels: an ordinary model."""
    scale = config.lora_alpha / config.lora_rank
    layers = {group: dict(weights) for group, weights in base["layers"].items()}
    for group, names in adapters["layers"].items():
        for name, pair in names.items():
            kernel = layers[group][name]["kernel"]
            layers[group][name] = layers[group][name] | {"kernel": kernel + scale * _lora_delta(pair, kernel)}
    return base | {"layers": layers}


def _lora_delta(pair: Params, kernel: jax.Array) -> jax.Array:
    """A · B of every layer as [L, outputs…, inputs…], where the kernel lies."""
    a, b = pair["lora_a"], pair["lora_b"]
    inputs, outputs = "dgrk"[: a.ndim - 2], "xyzw"[: b.ndim - 2]
    equation = f"l{inputs}s,ls{outputs}->l{outputs}{inputs}"
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum(equation, a, b, precision=precision, out_sharding=jax.typeof(kernel).sharding)


def _adapters(
    config: TrainConfig, model: DecoderConfig, rules: ShardingRules
) -> Iterator[tuple[tuple[str, str], jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]]:
    """(place, A, B) of every adapter, as shapes with shardings."""
    shapes, axes = abstract_params(model)["layers"], param_axes(model)["layers"]
    for (group, name), outputs in NUM_OUTPUT_DIMS.items():
        if name not in config.lora_targets or name not in shapes[group]:
            continue
        shape, along = shapes[group][name]["kernel"].shape, axes[group][name]["kernel"]

        def struct(size: tuple[int, ...], names: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(size, jnp.float32, sharding=rules.sharding(names))

        yield (
            (group, name),
            struct((shape[0], *shape[1 + outputs :], config.lora_rank), (along[0], *along[1 + outputs :], None)),
            struct((shape[0], config.lora_rank, *shape[1 : 1 + outputs]), (along[0], None, *along[1 : 1 + outputs])),
        )
