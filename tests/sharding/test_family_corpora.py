"""Corpora of each family: the same on any mesh, with the log-probabilities of transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from models_factory import Family
from parity_cases import transformers_logits

from jax_selftrain import hub
from jax_selftrain.config import SampleConfig
from jax_selftrain.likelihood import LoglikelihoodRequest, loglikelihoods
from jax_selftrain.sampling import sample


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["mistral", "olmo2", "olmo3", "smollm3", "gpt2", "gpt_neo"])
def test_a_corpus_is_the_same_on_any_mesh_with_the_log_probabilities_of_transformers(
    family: Family, tiny_model, tmp_path: Path
):
    pytest.importorskip("torch")
    folder = tiny_model(family)
    config = SampleConfig(
        model=str(folder), samples=24, max_tokens=140, batch_size=8, seed=5, mesh="data=1", out=str(tmp_path / "one")
    )
    documents = list(sample(config).iter_samples())
    split = sample(replace(config, mesh="data=2,model=2", preset="tensor", out=str(tmp_path / "split")))
    replicas = sample(replace(config, mesh="data=2", batch_size=4, out=str(tmp_path / "replicas")))
    assert [list(d.tokens) for d in replicas.iter_samples()] == [list(d.tokens) for d in documents]
    same = [list(one.tokens) == list(other.tokens) for one, other in zip(documents, split.iter_samples(), strict=True)]
    assert np.mean(same) > 0.9  # sums over two devices round otherwise, which decides near ties
    assert max(len(document.tokens) for document in documents) > 100  # beyond the windows

    rows = np.zeros((len(documents), 1 + config.max_tokens), np.int64)
    for row, document in zip(rows, documents, strict=True):
        row[: 1 + len(document.tokens)] = [1, *document.tokens]
    logits = transformers_logits(folder, rows[:, :-1]).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logprobs, rows[:, 1:, None], axis=2)[..., 0]
    totals = [row[: len(document.tokens)].sum() for row, document in zip(chosen, documents, strict=True)]
    np.testing.assert_allclose([document.logprob for document in documents], totals, atol=1e-3)

    requests = [LoglikelihoodRequest([1], document.tokens) for document in documents]
    scored = loglikelihoods(hub.load_model(folder, "data=2,model=2", preset="tensor"), requests)
    np.testing.assert_allclose([answer.loglikelihood for answer in scored], totals, atol=1e-3)
