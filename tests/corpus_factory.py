"""A sampled corpus out of given samples, as tests need it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jax_selftrain import hub
from jax_selftrain.corpus import Corpus, Sample, finalize_corpus, open_corpus, write_shard


def write_sampled_corpus(
    folder: Path, model: Path | str, samples: Sequence[Sample], *, per_shard: int | None = None, seed: int = 0
) -> Corpus:
    """Samples in the tokens of `model` (BOS 1, EOS 2), `per_shard` (default: all) to a shard."""
    per_shard = per_shard or len(samples)
    for first in range(0, len(samples), per_shard):
        write_shard(folder, first // per_shard, samples[first : first + per_shard], {})
    finalize_corpus(
        folder,
        {
            "kind": "sampled",
            "source": {"ref": "here", "fingerprint": "0" * 64},
            "tokenizer_fingerprint": hub.open_model(model).tokenizer_fingerprint,
            "start_id": 1,
            "stop_ids": [2],
            "policy": {},
            "seed": seed,
            "samples": len(samples),
            "samples_per_shard": per_shard,
            "retokenization_mismatches": 0,
        },
    )
    return open_corpus(folder)
