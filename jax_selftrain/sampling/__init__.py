"""From a model to a corpus: random words by identity, the token draw, the decode loop, the driver that fills it."""

from jax_selftrain.sampling.decode_loop import Architecture, DecodeLoop, Drawn, architecture_of, decode
from jax_selftrain.sampling.draw import draw, draw_margin, tree_path, tree_widths
from jax_selftrain.sampling.driver import program, sample
from jax_selftrain.sampling.greedy import greedy_continue
from jax_selftrain.sampling.policy import Policy, check_sample_config, make_policy, mask_logits
from jax_selftrain.sampling.words import random_words, sample_keys

__all__ = [
    "Architecture",
    "DecodeLoop",
    "Drawn",
    "Policy",
    "architecture_of",
    "check_sample_config",
    "decode",
    "draw",
    "draw_margin",
    "greedy_continue",
    "make_policy",
    "mask_logits",
    "program",
    "random_words",
    "sample",
    "sample_keys",
    "tree_path",
    "tree_widths",
]
