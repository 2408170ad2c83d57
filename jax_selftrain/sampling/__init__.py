"""From a model to a corpus: random words by identity, the token draw, the decode loop, the driver that fills it."""

from jax_selftrain.sampling.categorical import categorical, draw_margin, level_sizes, tree_path
from jax_selftrain.sampling.counter_rng import per_sample_keys, random_words
from jax_selftrain.sampling.decode import DecodeLoop, DecodeSpec, SampleBatch, decode, decode_spec
from jax_selftrain.sampling.greedy import greedy_continue
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
    "decode",
    "decode_spec",
    "draw_margin",
    "greedy_continue",
    "level_sizes",
    "make_sampling_params",
    "per_sample_keys",
    "random_words",
    "sample",
    "tree_path",
    "warp_logits",
]
