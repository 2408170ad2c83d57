"""ONE decoder for every family: its configuration, parameters, forward pass and decoding step."""

from jax_selftrain.models.cache import PAGE, Cache, decode_step, filled_blocks, flush_page, init_cache
from jax_selftrain.models.config import DecoderConfig, RopeConfig, axis_sizes
from jax_selftrain.models.decoder import forward, project
from jax_selftrain.models.known import Known, abstract_known, learned
from jax_selftrain.models.parameters import (
    Decoder,
    Params,
    abstract_params,
    init_params,
    param_axes,
    param_shardings,
)
from jax_selftrain.models.products import accumulation_dtype

__all__ = [
    "PAGE",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "Known",
    "Params",
    "RopeConfig",
    "abstract_known",
    "abstract_params",
    "accumulation_dtype",
    "axis_sizes",
    "decode_step",
    "filled_blocks",
    "flush_page",
    "forward",
    "init_cache",
    "init_params",
    "learned",
    "param_axes",
    "param_shardings",
    "project",
]
