"""One decoder for every family, with its KV cache."""

from jax_selftrain.models.config import DecoderConfig, axis_sizes
from jax_selftrain.models.decoder import forward, unembed
from jax_selftrain.models.params import Params, abstract_params, count_params, init_params

__all__ = [
    "DecoderConfig",
    "Params",
    "abstract_params",
    "axis_sizes",
    "count_params",
    "forward",
    "init_params",
    "unembed",
]
