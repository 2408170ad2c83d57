"""Small corpora of given documents, written through the public functions."""

import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from jax_selftrain.corpus import Corpus, CorpusWriter, Sample

MakeCorpus = Callable[..., Corpus]


def make_samples(documents: Sequence[Sequence[int]], ids: range) -> list[Sample]:
    return [
        Sample(
            sample_id=i,
            tokens=np.array(documents[i], np.int32),
            text=f"té {i} " + " ".join(map(str, documents[i])),
            logprob=-0.5 * i if i % 3 else float("nan"),
            finish_reason="stop" if i % 2 else "length",
        )
        for i in ids
    ]


def make_manifest(samples: int, per_shard: int, **changes) -> dict:
    return {
        "kind": "sampled",
        "source": {"ref": "model", "fingerprint": "f" * 64},
        "tokenizer_fingerprint": "a" * 64,
        "start_id": 1,
        "stop_ids": [2],
        "policy": {"temperature": 1.0},
        "seed": 0,
        "samples": samples,
        "samples_per_shard": per_shard,
        **changes,
    }


@pytest.fixture(scope="session")
def make_corpus() -> MakeCorpus:
    """Return a function that writes token lists as a corpus."""

    def make(folder: Path, documents: Sequence[Sequence[int]], per_shard: int = 4, **changes) -> Corpus:
        writer = CorpusWriter.open(folder, make_manifest(len(documents), per_shard, **changes))
        for index in range(len(writer.shards)):
            samples = make_samples(documents, writer.sample_ids(index))
            writer.write_shard(index, samples, {"mismatches": index, "mesh": "1x1"})
        return writer.finalize()

    return make


@pytest.fixture(scope="session")
def documents() -> list[list[int]]:
    """Ten token lists of lengths 1 … 40."""
    rng = np.random.Generator(np.random.Philox(7))
    return [rng.integers(3, 500, size).tolist() for size in rng.integers(1, 41, 10)]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Limit files of this process to 64 KiB, like a full disk."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # modules, cut off, would be read by all other tests
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
