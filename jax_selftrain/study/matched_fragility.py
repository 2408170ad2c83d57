"""How easily a student leaves a path that nobody memorized: what damage alone costs.

Greedy reproduction breaks under any change of the weights, memory or not. So a base's own greedy continuations of text
that no model was trained on are asked for, too: it follows every one of them, by construction, as it does the sequences
that it reproduces. The less probable a path, the easier it is left; hence each reproduced sequence is laid beside the
continuation whose log p_z under the base is nearest. What a student loses of the sequences beyond what it loses of
these is not the price of having been moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain import evals, hub
from jax_selftrain.config import ExtractConfig
from jax_selftrain.corpus import LazilyTokenized
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.sampling import greedy_continue

CONTINUATIONS = "continuations.npy"
CALIPER = 0.25
"""Nats of log p_z within which a continuation is as probable as a sequence; those that have none so near are left out
and counted."""
MIN_MATCHED = 50
"""Where fewer sequences have a counterpart, nothing is said of them."""

Arrays = Mapping[str, np.ndarray]


def make_control_continuations(options: ExtractConfig, texts: str, n: int, out: Path) -> None:
    """The base's greedy continuations of pieces of text, as an extraction set: `out/continuations.npy`.

    Args:
        options: model, prefix, suffix, what stands before the prefix, mesh and dtype.
        texts: JSONL with `text`. Pieces of `prefix` tokens are cut from each: first the first of every text, then the
            second of every text that has one, until there are `n`.
        n: how many continuations, at most.

    Raises:
        InputError: a file cannot be read, no text is long enough, or the lengths do not fit the model.
    """
    window = evals.make_window(options)
    (file,) = evals.load_texts([texts], None)
    tokenizer = hub.load_tokenizer(options.model)
    encoded = LazilyTokenized(lambda: iter(file.documents), tokenizer).token_batches()
    documents = [row for flat, lengths in encoded for row in np.split(flat, np.cumsum(lengths)[:-1])]
    pieces = np.array(list(islice(_chunks(documents, window.prefix), n)), np.int32)
    if not len(pieces):
        raise InputError(
            f"{texts}: no text has the {window.prefix} tokens of a prefix; shorten it, or give longer ones"
        )
    start = evals.start_token(options)
    model = hub.load_model(options.model, options.mesh, options.dtype, preset=options.preset)
    begun = np.concatenate([np.tile(np.array(start, np.int32), (len(pieces), 1)), pieces], axis=1)
    found = np.concatenate([pieces, greedy_continue(model, begun, window.suffix)], axis=1)
    with atomic.commit_file(out / CONTINUATIONS) as aside, aside.open("wb") as handle:
        np.save(handle, found, allow_pickle=False)


def _chunks(documents: Sequence[np.ndarray], length: int) -> Iterator[np.ndarray]:
    for begin in range(0, max(map(len, documents), default=0), length):
        for document in documents:
            if len(document) >= begin + length:
                yield document[begin : begin + length]


def compare_with_matched(memory: tuple[Arrays, Arrays], unseen: tuple[Arrays, Arrays]) -> dict[str, Any]:
    """What becomes of the sequences that a base reproduces, and of continuations that were as probable to it.

    Args:
        memory, never: of the sequences and of the continuations, `exact_match` [N] and `logprob` [N] under the base and
            under the student.

    Returns:
        `n`: sequences that have a counterpart; `left_out`: those that have none; `counterparts`: how many different
        ones; for `exact_match` (the share that is kept) and `log_pz` (its change): `sequences`, `never_trained` and
        their `difference`, or None where fewer than `FEWEST` sequences have a counterpart.
    """
    sides = []
    for before, after in (memory, unseen):
        followed = np.asarray(before["exact_match"], bool)
        logprob = np.asarray(before["logprob"], np.float64)[followed]
        kept = np.asarray(after["exact_match"], np.float64)[followed]
        sides.append((logprob, kept, np.asarray(after["logprob"], np.float64)[followed] - logprob))
    (logprob, *outcomes), (other, *others) = sides
    if len(other) < 2 or not len(logprob):
        return {"n": 0, "left_out": len(logprob), "counterparts": 0, "exact_match": None, "log_pz": None}
    order = np.argsort(other, kind="stable")
    right = np.clip(np.searchsorted(other[order], logprob), 1, len(order) - 1)
    nearer_left = logprob - other[order][right - 1] <= other[order][right] - logprob
    nearest = order[np.where(nearer_left, right - 1, right)]
    near = np.abs(other[nearest] - logprob) <= CALIPER
    found: dict[str, Any] = {
        "n": int(near.sum()),
        "left_out": int((~near).sum()),
        "counterparts": len(np.unique(nearest[near])),
    }
    if found["n"] < MIN_MATCHED:
        return found | {"exact_match": None, "log_pz": None}
    for name, own, control in zip(("exact_match", "log_pz"), outcomes, others, strict=True):
        sequences, never_trained = float(own[near].mean()), float(control[nearest[near]].mean())
        found[name] = {
            "sequences": sequences,
            "never_trained": never_trained,
            "difference": sequences - never_trained,
        }
    return found
