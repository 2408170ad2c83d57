"""One decoder for every family, with its KV cache."""

from jax_selftrain.models.config import DecoderConfig, RopeConfig, axis_sizes
from jax_selftrain.models.decoder import forward, unembed
from jax_selftrain.models.kv_cache import (
    TAIL_LEN,
    KVCache,
    decode_step,
    flush_tail,
    init_cache,
    num_used_blocks,
    prefill,
)
from jax_selftrain.models.matmul import accumulation_dtype
from jax_selftrain.models.params import Decoder, Params, abstract_params, init_params, param_axes, param_shardings
from jax_selftrain.models.token_precompute import Precomputed, abstract_precomputed, precompute

__all__ = [
    "TAIL_LEN",
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "Params",
    "Precomputed",
    "RopeConfig",
    "abstract_params",
    "abstract_precomputed",
    "accumulation_dtype",
    "axis_sizes",
    "decode_step",
    "flush_tail",
    "forward",
    "init_cache",
    "init_params",
    "num_used_blocks",
    "param_axes",
    "param_shardings",
    "precompute",
    "prefill",
    "unembed",
]
