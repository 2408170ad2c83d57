"""Sampling: random bits, token draw, decode loop, generation, corpus driver."""

from jax_selftrain.sampling.generate import generate
from jax_selftrain.sampling.sample_corpus import abstract_program, sample
from jax_selftrain.sampling.sampling_params import SamplingParams, warp_logits

__all__ = ["SamplingParams", "abstract_program", "generate", "sample", "warp_logits"]
