"""Assignment of sequences to H, the held-out half of an extraction set."""

import hashlib

import numpy as np


def held_out_half(fingerprint: str, index: np.ndarray) -> np.ndarray:
    """Assign half of a set to held-out H by hash, bool [N].

    Args:
      fingerprint: from `sequences_fingerprint`.
      index: `ExtractionSet.sequence_id`. The tokenizer is not involved, so all students have the same H.
    """
    return np.array([hashlib.sha256(f"{fingerprint} {i}".encode()).digest()[0] % 2 == 0 for i in index.tolist()], bool)


def relearned_halves(fingerprint: str, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divide H by hash into sequences to train on and to measure.

    Args:
      fingerprint, index: see `held_out_half`.

    Returns:
      Members of both halves, bool [N] each.
    """
    held_out, shown = held_out_half(fingerprint, index), held_out_half(f"{fingerprint} relearned", index)
    return held_out & shown, held_out & ~shown
