"""Declarations of parameters as Flax NNX modules: shape, logical axes, initializer.

Every parameter of a layer has a leading dimension `[L, …]`, so that the forward pass scans over layers and compile
time does not grow with depth. A module is abstract: it declares and holds no memory. The nested dict that all pure
functions take, its shapes, shardings and random initialization derive from it.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax import Array
from jax.typing import DTypeLike

from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.io.rng import make_rng
from jax_selftrain.models.config import DecoderConfig, axis_sizes

Params = dict[str, Any]
"""Nested dict of arrays with the structure of `Decoder`."""

Initializer = Literal["normal", "ones", "zeros"]


class Decoder(nnx.Module):
    """Parameters of a decoder: `embed`, stacked `layers`, `final_norm` and, unless tied, `head`.

    Outputs of a kernel come first, as in Hugging Face: a product with few tokens, and the gradient, use the kernel
    without a copy (on a CPU 1.1 to 1.6 times as fast as inputs first). Hugging Face's attention head is g·R + r.
    """

    def __init__(self, config: DecoderConfig):
        sizes = axis_sizes(config) | {"layers": config.num_layers}

        def param(axes: str, init: Initializer) -> nnx.Param:
            names = tuple(axes.split())
            shape = jax.ShapeDtypeStruct(tuple(sizes[name] for name in names), jnp.float32)
            return nnx.Param(shape, axes=names, init=init)

        def dense(outputs: str, inputs: str, bias: bool) -> nnx.Dict:
            kernel = {"kernel": param(f"layers {outputs} {inputs}", "normal")}
            return nnx.Dict(kernel | ({"bias": param(f"layers {outputs}", "zeros")} if bias else {}))

        def norm(axes: str) -> nnx.Dict:
            scale = {"scale": param(axes, "ones")}
            return nnx.Dict(scale | ({"bias": param(axes, "zeros")} if config.norm == "layernorm" else {}))

        kv, queries = "kv_heads head_dim", "kv_heads q_per_kv head_dim"
        attn = {
            "q": dense(queries, "embed", config.qkv_bias),
            "k": dense(kv, "embed", config.qkv_bias),
            "v": dense(kv, "embed", config.qkv_bias),
            "o": dense("embed", queries, config.out_bias),
        }
        if config.qk_norm:
            for name, axes in (("q_norm", queries), ("k_norm", kv)):
                axes = axes if config.qk_norm == "width" else "head_dim"
                attn[name] = nnx.Dict(scale=param(f"layers {axes}", "ones"))
        names = ("gate", "up") if config.gated_mlp else ("up",)
        mlp = {name: dense("mlp", "embed", config.mlp_bias) for name in names}
        mlp["down"] = dense("embed", "mlp", config.mlp_bias)
        self.embed = nnx.Dict(embedding=param("vocab embed", "normal"))
        if config.learned_positions:
            self.embed["positions"] = param("positions embed", "normal")
        self.layers = nnx.Dict(
            attn=nnx.Dict(attn), mlp=nnx.Dict(mlp), attn_norm=norm("layers embed"), mlp_norm=norm("layers embed")
        )
        self.final_norm = norm("embed")
        if not config.tie_word_embeddings:
            self.head = nnx.Dict(kernel=param("vocab embed", "normal"))


def _param_tree(config: DecoderConfig) -> list[tuple[tuple[str, ...], Any]]:
    return list(nnx.to_flat_state(nnx.split(Decoder(config))[1]))


def count_params(config: DecoderConfig) -> int:
    """Return the number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def abstract_params(
    config: DecoderConfig, dtype: DTypeLike = jnp.float32, rules: ShardingRules | None = None
) -> Params:
    """Return all parameters as `jax.ShapeDtypeStruct`, sharded if there are rules."""

    def declare(declared: Any) -> jax.ShapeDtypeStruct:
        shape, axes = declared.get_value().shape, declared.get_metadata("axes")
        return jax.ShapeDtypeStruct(shape, dtype) if rules is None else rules.abstract_array(shape, dtype, axes)

    return traverse_util.unflatten_dict({path: declare(declared) for path, declared in _param_tree(config)})


def param_axes(config: DecoderConfig) -> Params:
    """Return the logical axes of all parameters, a tuple per leaf."""
    return traverse_util.unflatten_dict({path: declared.get_metadata("axes") for path, declared in _param_tree(config)})


def init_params(config: DecoderConfig, seed: int, rules: ShardingRules) -> Params:
    """Initialize fp32 parameters: normal matrices, norms one, biases zero.

    Values are a pure function of (seed, name, layer) on every mesh, platform and JAX version. Each shard is drawn on
    its host, a layer at a time.
    """

    def fill(path: tuple[str, ...], declared: Any) -> Array:
        shape, axes = declared.get_value().shape, declared.get_metadata("axes")
        init: Initializer = declared.get_metadata("init")

        def init_shard(index: tuple[slice, ...] | None) -> np.ndarray:
            index = (slice(None),) * len(shape) if index is None else index
            if init != "normal":
                return np.full(shape, float(init == "ones"), np.float32)[index]
            if axes[0] != "layers":
                return _normal(seed, path, 0, shape, config.initializer_range)[index]
            layers = range(*index[0].indices(shape[0]))
            values = [_normal(seed, path, layer, shape[1:], config.initializer_range)[index[1:]] for layer in layers]
            return np.stack(values)

        return jax.make_array_from_callback(shape, rules.sharding(axes), init_shard)

    return traverse_util.unflatten_dict({path: fill(path, declared) for path, declared in _param_tree(config)})


def _normal(seed: int, path: tuple[str, ...], layer: int, shape: tuple[int, ...], std: float) -> np.ndarray:
    generator = make_rng("initial parameters", seed, "/".join(path), layer)
    return np.float32(std) * generator.standard_normal(math.prod(shape), np.float32).reshape(shape)
