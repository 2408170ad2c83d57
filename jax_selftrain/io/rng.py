"""Keyed random number generators for everything that the host draws.

A stream depends on its key alone: neither the order of calls nor the number of processes changes it. Philox (Salmon et
al., SC 2011) accepts any key, so a hash of the purpose, the seed and further identifiers gives independent streams.

Two streams have a key of their own, because stored runs depend on them: the order of training rows
(`corpus.mixture`) and the signs of the sign-flip arm (`training.data`).
"""

import hashlib
import json

import numpy as np


def make_rng(purpose: str, *key: int | str) -> np.random.Generator:
    """Return a Philox generator that is keyed by (purpose, *key).

    Args:
      purpose: the use of the stream; a constant of the caller, so that two uses of a seed are independent.
      key: the seed, then the identifiers of the object that is drawn (a parameter's path, a sample id).
    """
    digest = hashlib.sha256(json.dumps([purpose, *key]).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], "<u8")))


def random_permutation(rng: np.random.Generator, n: int) -> np.ndarray:
    """Return a random order of n items, int64 [n].

    The order is the same in every NumPy version: NumPy guarantees the bit stream of a generator, but not what
    `Generator.permutation` makes of it (NEP 19).
    """
    return np.argsort(rng.bit_generator.random_raw(n), kind="stable")
