"""The `subset` command: random documents up to a token budget.

Draw k of subset s is keyed by (seed, s, k), so that a larger subset begins with the draws of a smaller one and subsets
are independent replicates. arXiv:2605.31126 draws with replacement.
"""

from __future__ import annotations

import numpy as np

from jax_selftrain.config import SubsetConfig, yaml_io
from jax_selftrain.corpus.reader import Corpus, open_corpus
from jax_selftrain.corpus.transforms import map_corpus
from jax_selftrain.errors import InputError
from jax_selftrain.io.rng import make_rng, random_permutation


def draw_subset(config: SubsetConfig) -> Corpus:
    """Write documents drawn from a corpus until the token budget is reached.

    The last draw may exceed the budget. Documents are in the order of the source; one drawn twice is there twice.

    Raises:
        InputError: an option is out of range, a folder cannot be read or written, or the corpus has too few tokens.
    """
    yaml_io.require(config)
    source = open_corpus(config.corpus)
    lengths = np.concatenate([lengths for _, lengths in source.token_batches()])
    copies = count_draws(lengths, config.tokens or 0, config.draw, config.seed, config.subset, where=config.corpus)
    policy = {f"subset {name}": getattr(config, name) for name in ("tokens", "draw", "subset", "seed")}
    return map_corpus(source, config.out, "subset", {"policy": policy}, lambda samples: (samples, {}), copies=copies)


def count_draws(lengths: np.ndarray, tokens: int, draw: str, seed: int, subset: int, *, where: str) -> np.ndarray:
    """Count how often each document is drawn.

    Args:
        lengths: int [N], tokens of each document.
        tokens: the budget.
        draw: `bootstrap` (with replacement) or `without-replacement`.
        seed, subset: key of the draws.
        where: the corpus, for messages.

    Returns:
        int64 [N].
    """
    total = int(lengths.sum())
    if not total or (draw == "without-replacement" and total < tokens):
        raise InputError(
            f"{where}: has {total:,} tokens, less than the {tokens:,} to draw without replacement; sample more, lower "
            "--tokens, or draw with --draw bootstrap"
        )
    rng = make_rng("subset", seed, subset)
    order, drawn = np.zeros(0, np.int64), np.zeros(1, np.int64)
    if draw == "without-replacement":
        order = random_permutation(rng, len(lengths))
        drawn = np.cumsum(lengths[order])
    while drawn[-1] < tokens:
        # 64 random bits modulo N: the bias is below N / 2^64.
        more = (rng.bit_generator.random_raw(4096) % np.uint64(len(lengths))).astype(np.int64)
        order = np.concatenate([order, more])
        drawn = np.cumsum(lengths[order])
    return np.bincount(order[: np.searchsorted(drawn, tokens) + 1], minlength=len(lengths))
