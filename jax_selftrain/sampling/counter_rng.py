"""Counter-based random bits.

They are a pure function of (seed, sample id, token index, word index). A sample's randomness must not depend on its
batch, the machine, the mesh or a restart, so there is no generator state. Each 32-bit word is one output of
threefry-2x32 with 20 rounds (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The
code does not use `jax.random`, whose streams depend on flags (`jax_threefry_partitionable`, `jax_default_prng_impl`)
and library versions: a corpus must survive an upgrade.

    key of a sample      = threefry(key = 64-bit seed, counter = 64-bit sample id)
    word j of token t    = threefry(key = key of the sample, counter = (t, j // 2))[j % 2]

64-bit numbers are (high, low) pairs of words, as in `jax.random.PRNGKey`.
"""

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

UInt32Scalar = TypeVar("UInt32Scalar", jax.Array, np.ndarray)

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_LOW = 0xFFFF_FFFF


def threefry2x32(
    key: tuple[UInt32Scalar, UInt32Scalar], counter: tuple[UInt32Scalar, UInt32Scalar]
) -> tuple[UInt32Scalar, UInt32Scalar]:
    """Apply the threefry-2x32 block function with 20 rounds, elementwise.

    Args:
      key: two uint32 arrays; counter: two uint32 arrays; all four broadcast together.

    Returns:
      Two uint32 arrays of the broadcast shape, on the host or the device as the inputs are.
    """
    schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    x0, x1 = counter[0] + schedule[0], counter[1] + schedule[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x0 = x0 + x1
            x1 = (x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))
            x1 = x0 ^ x1
        x0 = x0 + schedule[(block + 1) % 3]
        x1 = x1 + schedule[(block + 2) % 3] + np.uint32(block + 1)
    return x0, x1


def per_sample_keys(seed: int, sample_ids: Sequence[int] | np.ndarray) -> UInt32[np.ndarray, "B 2"]:
    """Compute the key of each sample on the host.

    Args:
      seed: 0 … 2⁶⁴−1.
      sample_ids: [B], 0 … 2⁶³−1.
    """
    ids = np.asarray(sample_ids, np.int64).astype(np.uint64)
    counter = (ids >> np.uint64(32)).astype(np.uint32), (ids & np.uint64(_LOW)).astype(np.uint32)
    key = np.array([seed >> 32], np.uint32), np.array([seed & _LOW], np.uint32)
    return np.stack(threefry2x32(key, counter), axis=-1)


def token_random_bits(keys: UInt32[Array, "B 2"], step: Int[Array, " B"], n: int) -> UInt32[Array, "B n"]:
    """Compute n random words for token `step` of each sample."""
    pairs = jnp.arange((n + 1) // 2, dtype=jnp.uint32)[None]
    x0, x1 = threefry2x32((keys[:, :1], keys[:, 1:]), (step[:, None].astype(jnp.uint32), pairs))
    return jnp.stack((x0, x1), axis=-1).reshape(keys.shape[0], -1)[:, :n]
