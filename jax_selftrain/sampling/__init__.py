"""Sampling: random bits, token draw, decode loop, generation, corpus driver."""

from jax_selftrain.sampling.categorical import categorical, level_sizes
from jax_selftrain.sampling.counter_rng import per_sample_keys
from jax_selftrain.sampling.decode import DecodeLoop, DecodeSpec, SampleBatch
from jax_selftrain.sampling.generate import generate
from jax_selftrain.sampling.sample_corpus import abstract_program, sample
from jax_selftrain.sampling.sampling_params import (
    SamplingParams,
    check_sample_config,
    make_sampling_params,
    warp_logits,
)

__all__ = [
    "DecodeLoop",
    "DecodeSpec",
    "SampleBatch",
    "SamplingParams",
    "abstract_program",
    "categorical",
    "check_sample_config",
    "generate",
    "level_sizes",
    "make_sampling_params",
    "per_sample_keys",
    "sample",
    "warp_logits",
]
