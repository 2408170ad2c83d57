"""Subsets of a corpus, with and without replacement."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from corpus_factory import write_sampled_corpus
from scipy import stats

from jax_selftrain.config import SubsetConfig
from jax_selftrain.corpus import Corpus, Sample, draw_subset
from jax_selftrain.corpus.transforms import count_draws
from jax_selftrain.errors import InputError


@pytest.fixture
def source(tiny_model: Callable[..., Path], tmp_path: Path) -> Corpus:
    """Sixty samples of 1 to 12 tokens."""
    rows = [np.arange(3, 4 + i % 12, dtype=np.int32) for i in range(60)]
    samples = [Sample(i, row, f"sample {i}", -1.0 - i, "length") for i, row in enumerate(rows)]
    return write_sampled_corpus(tmp_path / "source", tiny_model("llama"), samples, per_shard=8)


@pytest.mark.parametrize("draw", ["bootstrap", "without-replacement"])
def test_a_subset_has_the_budget_and_is_a_function_of_seed_and_number(source: Corpus, tmp_path: Path, draw):
    config = SubsetConfig(str(source.folder), str(tmp_path / "a"), tokens=200, draw=draw)
    subset = draw_subset(config)
    before = {sample.text: sample for sample in source.iter_samples()}
    samples = list(subset.iter_samples())
    assert [sample.sample_id for sample in samples] == list(range(len(samples)))
    assert sum(len(sample.tokens) for sample in samples) == subset.n_tokens
    assert 200 <= subset.n_tokens < 212  # the last draw reaches the budget
    for sample in samples:
        assert sample.tokens.tolist() == before[sample.text].tokens.tolist()
        assert sample.logprob == before[sample.text].logprob
    times = Counter(subset.iter_texts())
    assert (max(times.values()) > 1) == (draw == "bootstrap")
    assert draw_subset(replace(config, out=str(tmp_path / "b"))).fingerprint == subset.fingerprint
    for change in ({"subset": 1}, {"seed": 1}):
        other = draw_subset(replace(config, out=str(tmp_path / f"{change}"), **change))
        assert Counter(other.iter_texts()) != times
    larger = draw_subset(replace(config, out=str(tmp_path / "larger"), tokens=300))
    assert Counter(larger.iter_texts()) >= times
    with pytest.raises(InputError, match="was created with"):
        draw_subset(replace(config, tokens=201))


def test_draws_are_uniform():
    """Chi-square over 1,000 documents; the level is 1e-4."""
    for draw, budget in (("bootstrap", 100_000), ("without-replacement", 300)):
        times = sum(
            count_draws(np.ones(1000, int), "tokens", SubsetConfig(tokens=budget, draw=draw, subset=subset), where="c")
            for subset in range(1 if draw == "bootstrap" else 300)
        )
        assert stats.chisquare(times).pvalue > 1e-4


def test_too_few_tokens_are_refused_without_replacement_alone(source: Corpus, tmp_path: Path):
    config = SubsetConfig(str(source.folder), str(tmp_path / "out"), tokens=1000)
    with pytest.raises(InputError, match="has 390 tokens, less than the 1,000 to draw without replacement"):
        draw_subset(replace(config, draw="without-replacement"))
    assert not (tmp_path / "out").exists()
    assert draw_subset(config).n_tokens >= 1000
    with pytest.raises(InputError, match="--tokens"):
        draw_subset(replace(config, tokens=0))


def test_a_budget_of_bytes_counts_the_bytes_of_the_text(source: Corpus, tmp_path: Path):
    config = SubsetConfig(str(source.folder), str(tmp_path / "a"), bytes=300, draw="without-replacement")
    subset = draw_subset(config)
    sizes = [len(text.encode()) for text in subset.iter_texts()]
    assert 300 <= sum(sizes) < 300 + max(sizes)
    assert draw_subset(replace(config, out=str(tmp_path / "b"), bytes=301)).fingerprint != subset.fingerprint
    for budget in ({"bytes": None}, {"tokens": 300}):
        with pytest.raises(InputError, match="give one of them"):
            draw_subset(replace(config, out=str(tmp_path / "c"), **budget))
