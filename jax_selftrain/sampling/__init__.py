"""Sampling: random bits, token draw, decode loop, generation, corpus driver."""

from jax_selftrain.sampling.generate import generate
from jax_selftrain.sampling.sample_corpus import abstract_program, sample
from jax_selftrain.sampling.sampling_params import SamplingParams, check_sample_config, warp_logits

__all__ = ["SamplingParams", "abstract_program", "check_sample_config", "generate", "sample", "warp_logits"]
