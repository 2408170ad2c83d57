"""Decontaminated corpora and their size-matched controls."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from corpus_factory import write_sampled_corpus

from jax_selftrain.corpus import Corpus, Sample, remove_overlapping, size_matched_control
from jax_selftrain.errors import InputError

HELD_OUT = np.arange(100, 124, dtype=np.int32)[None]
"""One suffix of 24 tokens."""
RUNS = {3: 15, 7: 16, 11: 17, 20: 24}
"""{sample: number of suffix tokens in it}; samples with 16 or more are dropped."""


@pytest.fixture
def source(tiny_model: Callable[..., Path], tmp_path: Path) -> Corpus:
    """Forty samples with planted runs, in five shards."""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(40):
        row = rng.integers(200, 512, 32 + i).astype(np.int32)
        if i in RUNS:
            row[5 : 5 + RUNS[i]] = HELD_OUT[0, -RUNS[i] :]
        samples.append(Sample(i, row, f"sample {i}", -1.0, "length" if i % 3 == 0 else "stop"))
    return write_sampled_corpus(tmp_path / "source", tiny_model("llama"), samples, per_shard=8, seed=5)


def dropped_from(source: Corpus, corpus: Corpus) -> set[int]:
    return {int(text.split()[1]) for text in set(source.iter_texts()) - set(corpus.iter_texts())}


def test_what_shares_sixteen_tokens_is_dropped_and_what_shares_fifteen_stays(source: Corpus, tmp_path: Path):
    clean = remove_overlapping(source.folder, HELD_OUT, tmp_path / "clean")
    assert dropped_from(source, clean) == {7, 11, 20}
    assert clean.manifest["dropped"] == 3
    before = {sample.text: sample for sample in source.iter_samples()}
    for number, sample in enumerate(clean.iter_samples()):
        assert sample.sample_id == number
        assert sample.tokens.tolist() == before[sample.text].tokens.tolist()
        assert sample.finish_reason == before[sample.text].finish_reason
    assert [sample.text for sample in clean.iter_samples()] == [
        text for text in before if text in set(clean.iter_texts())
    ]
    assert clean.start_id == source.start_id


def test_of_a_short_suffix_all_must_be_shared(source: Corpus, tmp_path: Path):
    assert dropped_from(source, remove_overlapping(source.folder, HELD_OUT[:, -15:], tmp_path / "clean")) == set(RUNS)


def test_the_size_matched_control_drops_as_many_similar_others(source: Corpus, tmp_path: Path):
    control = size_matched_control(source.folder, HELD_OUT, tmp_path / "control", seed=1)
    dropped = dropped_from(source, control)
    assert len(dropped) == control.manifest["dropped"] == 3
    assert not dropped & {7, 11, 20}
    # Each sample is a token longer than the one before it, and two in three end by themselves, as these three do:
    # the nearest is at most two away, unless another has taken it.
    assert all(number % 3 for number in dropped)
    assert all(min(abs(place - number) for number in dropped) <= 2 for place in (7, 11, 20))
    again = size_matched_control(source.folder, HELD_OUT, tmp_path / "again", seed=1)
    assert again.fingerprint == control.fingerprint


def test_among_equals_the_seed_chooses(tiny_model: Callable[..., Path], tmp_path: Path):
    filler = np.arange(300, 330, dtype=np.int32)
    rows = [np.concatenate([HELD_OUT[0], filler])[:30] if i < 2 else filler for i in range(30)]
    samples = [Sample(i, row.astype(np.int32), f"sample {i}", -1.0, "length") for i, row in enumerate(rows)]
    source = write_sampled_corpus(tmp_path / "s", tiny_model("llama"), samples, per_shard=8, seed=5)
    chosen = [
        dropped_from(source, size_matched_control(source.folder, HELD_OUT, tmp_path / f"c{seed}", seed=seed))
        for seed in range(8)
    ]
    assert len(set(map(frozenset, chosen))) > 4
    assert all(len(one) == 2 and not one & {0, 1} for one in chosen)


def test_an_interrupted_one_is_completed_with_the_same_bytes(source: Corpus, tmp_path: Path):
    whole = remove_overlapping(source.folder, HELD_OUT, tmp_path / "whole")
    part = remove_overlapping(source.folder, HELD_OUT, tmp_path / "part")
    for name in ("corpus.json", "shard-000001.parquet", "shard-000003.parquet"):
        (part.folder / name).unlink()
    assert remove_overlapping(source.folder, HELD_OUT, tmp_path / "part").fingerprint == whole.fingerprint
    with pytest.raises(InputError, match="was created with"):
        remove_overlapping(source.folder, HELD_OUT, tmp_path / "part", length=8)


def test_impossible_requests_are_refused(source: Corpus, tmp_path: Path):
    everything = np.stack([sample.tokens[:18] for sample in source.iter_samples()])
    with pytest.raises(InputError, match="none would remain"):
        remove_overlapping(source.folder, everything, tmp_path / "none")
    with pytest.raises(InputError, match="too few documents without overlap"):
        size_matched_control(source.folder, everything[:30], tmp_path / "none", seed=1)
