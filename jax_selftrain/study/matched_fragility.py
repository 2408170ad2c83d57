"""Matched controls of memorization: greedy continuations that no model memorized.

Any change of the weights breaks some greedy reproductions. As controls serve the base's own greedy continuations of
text that no model was trained on: the base reproduces all of them by construction. Less probable continuations break
more easily, so each reproduced sequence is matched with the continuation whose log p_z under the base is nearest. A
larger loss on the sequences than on the controls is not explained by damage.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain import evals, hub
from jax_selftrain.config import ExtractConfig
from jax_selftrain.corpus import LazilyTokenized
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.sampling import SamplingParams, generate

CONTINUATIONS = "continuations.npy"
CALIPER = 0.25
"""Maximum difference of log p_z of a match, in nats; sequences without a match are counted."""
MIN_MATCHED = 50
"""Minimum number of matched sequences for a result."""

Arrays = Mapping[str, np.ndarray]


def make_control_continuations(options: ExtractConfig, texts: str, n: int, out: Path) -> None:
    """Write the base's greedy continuations of text as an extraction set, `out/continuations.npy`.

    Args:
        options: model, prefix, suffix, start token, mesh and dtype.
        texts: JSONL with `text`. Prompts are chunks of `prefix` tokens: the first chunk of every text, then the second,
            until there are `n`.
        n: maximum number of continuations.
        out: the folder to write to.

    Raises:
        InputError: a file cannot be read, no text is long enough, or the lengths do not fit the model.
    """
    window = evals.make_window(options)
    (file,) = evals.load_texts([texts])
    encoded = LazilyTokenized(lambda: iter(file.documents), hub.open_model(options.model).tokenizer).token_batches()
    documents = [row for flat, lengths in encoded for row in np.split(flat, np.cumsum(lengths)[:-1])]
    ends = range(window.prefix, max(map(len, documents), default=0) + 1, window.prefix)
    rows = (row[end - window.prefix : end] for end in ends for row in documents if len(row) >= end)
    chunks = np.array(list(islice(rows, n)), np.int32)
    if not len(chunks):
        raise InputError(
            f"{texts}: no text has {window.prefix} tokens, the length of a prefix; shorten it, or give longer texts"
        )
    start = evals.find_start_tokens(options)
    model = hub.load_model(options.model, options.mesh, options.dtype, preset=options.preset)
    prompts = np.concatenate([np.tile(np.array(start, np.int32), (len(chunks), 1)), chunks], axis=1)
    greedy = SamplingParams(max_tokens=window.suffix, temperature=0)
    found = np.concatenate([chunks, np.array(generate(model, prompts.tolist(), greedy), np.int32)], axis=1)
    with atomic.commit_file(out / CONTINUATIONS) as path, path.open("wb") as handle:
        np.save(handle, found, allow_pickle=False)


def compare_with_matched(memory: tuple[Arrays, Arrays], unseen: tuple[Arrays, Arrays]) -> dict[str, Any]:
    """Compare reproduced sequences with equally probable continuations of unseen text.

    Args:
        memory: `exact_match` [N] and `logprob` [N] of the sequences under the base and under the student.
        unseen: the same of the continuations.

    Returns:
        `n`: matched sequences; `unmatched`: sequences without a match; `controls`: distinct continuations; for
        `exact_match` (the share that is kept) and `log_pz` (its change): `sequences`, `controls` and their
        `difference`, or None if `n` is less than `MIN_MATCHED`.
    """
    sides = []
    for before, after in (memory, unseen):
        kept = np.asarray(before["exact_match"], bool)
        logprob, new = (np.asarray(side["logprob"], np.float64)[kept] for side in (before, after))
        sides.append((logprob, {"exact_match": after["exact_match"][kept].astype(float), "log_pz": new - logprob}))
    (logprob, outcomes), (other, others) = sides
    found: dict[str, Any] = {"n": 0, "unmatched": len(logprob), "controls": 0, "exact_match": None, "log_pz": None}
    if len(other) < 2 or not len(logprob):
        return found
    order = np.argsort(other, kind="stable")
    right = np.clip(np.searchsorted(other[order], logprob), 1, len(order) - 1)
    nearer_left = logprob - other[order][right - 1] <= other[order][right] - logprob
    nearest = order[np.where(nearer_left, right - 1, right)]
    near = np.abs(other[nearest] - logprob) <= CALIPER
    found |= {"n": int(near.sum()), "unmatched": int((~near).sum()), "controls": len(np.unique(nearest[near]))}
    if found["n"] >= MIN_MATCHED:
        for name, values in outcomes.items():
            sequences, controls = float(values[near].mean()), float(others[name][nearest[near]].mean())
            found[name] = {"sequences": sequences, "controls": controls, "difference": sequences - controls}
    return found
