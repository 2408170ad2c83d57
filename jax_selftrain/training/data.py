"""Batches on the mesh, a function of (rows, shares, seed, index)."""

from typing import Any

import jax
import numpy as np

from jax_selftrain.config import TrainConfig
from jax_selftrain.corpus import Mixture, PackedRows
from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.training.loss import Batch

GOLDFISH_CONTEXT = 13
"""Tokens that decide whether the next one is dropped."""


def load_batch(config: TrainConfig, rules: ShardingRules, mixture: Mixture, n: int) -> Batch:
    """Load batch n onto the mesh, `[grad_accum, batch_size / grad_accum, …]`.

    Each process reads only the rows of its own devices from the memory-mapped corpora. Rows of a small corpus repeat
    within a batch, in the order of its next epoch. With `random_loss_sign`, the weights of each document in a row are
    multiplied by +1 or −1 (`random_signs`); with `goldfish_k`, some targets are dropped (`goldfish_mask`).
    """
    corpus_ids, row_ids = (
        ids.reshape(config.grad_accum, -1) for ids in mixture.batch(config.batch_size, config.seed, n)
    )
    sharding = rules.sharding((None, "batch", None))

    def load(field: str) -> jax.Array:
        example = getattr(mixture.components[0], field)

        def read(index: Any) -> np.ndarray:
            corpora, rows = corpus_ids[index[:2]], row_ids[index[:2]]
            values = np.empty((*rows.shape, example.shape[1]), example.dtype)
            for corpus in np.unique(corpora).tolist():
                part, chosen = mixture.components[corpus], corpora == corpus
                values[chosen] = getattr(part, field)[rows[chosen]]
                if field == "weights" and config.random_loss_sign:
                    values[chosen] *= random_signs(part, rows[chosen], config.seed, corpus)
                if field == "weights" and config.goldfish_k:
                    values[chosen] *= goldfish_mask(part.tokens[rows[chosen]], config.goldfish_k)
            return values[..., index[2]]

        return jax.make_array_from_callback((*row_ids.shape, example.shape[1]), sharding, read)

    return Batch(*map(load, Batch._fields))


def random_signs(rows: PackedRows, row_ids: np.ndarray, seed: int, corpus: int) -> np.ndarray:
    """Return +1 or −1 by (seed, corpus, row, document), int64 [rows, T]."""
    key = _splitmix64(_splitmix64(np.array([seed % 2**64], np.uint64)) + np.uint64(corpus))
    documents = (row_ids.astype(np.uint64)[:, None] << np.uint64(20)) + rows.segments[row_ids].astype(np.uint64)
    return np.where(_splitmix64(documents ^ key) >> np.uint64(63), 1, -1)


def goldfish_mask(tokens: np.ndarray, k: int) -> np.ndarray:
    """Return 0 for one of k targets, else 1 (goldfish loss, arXiv:2406.10209).

    A hash of the preceding 13 tokens decides, so that a passage lacks the same tokens wherever it occurs.

    Args:
        tokens: int [rows, T + 1].
        k: the share of dropped targets is 1 / k.

    Returns float32 [rows, T]. A target after fewer than 13 tokens of its row is kept.
    """
    targets = tokens.shape[1] - 1
    mask = np.ones((len(tokens), targets), np.float32)
    contexts = max(0, targets - GOLDFISH_CONTEXT + 1)
    key = np.zeros((len(tokens), contexts), np.uint64)
    for start in range(GOLDFISH_CONTEXT):
        key = _splitmix64(key ^ tokens[:, start : start + contexts].astype(np.uint64))
    mask[:, targets - contexts :] = key % np.uint64(k) != 0
    return mask


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Hash integers with splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
