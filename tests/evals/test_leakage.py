"""Planted leakage is found in every form of training text."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpus_factory import write_sampled_corpus
from models_factory import tiny_texts

from jax_selftrain import cli, hub
from jax_selftrain.config import ImportCorpusConfig, LeakageConfig
from jax_selftrain.corpus import Sample, import_text, overlap
from jax_selftrain.errors import InputError
from jax_selftrain.evals import measure_leakage
from jax_selftrain.io import json_files
from jax_selftrain.stats.estimators import wilson_interval


def write_corpus(folder, model, documents):
    samples = [
        Sample(sample_id, np.asarray(tokens, np.int32), "", -1.0, "length")
        for sample_id, tokens in enumerate(documents)
    ]
    return str(write_sampled_corpus(folder, model, samples, per_shard=len(samples) // 2).folder)


@pytest.fixture
def planted_corpus(tmp_path, tiny_model):
    """Twenty samples with planted matches, and the training text."""
    rng = np.random.default_rng(0)
    training = rng.integers(10, 250, (12, 300)).astype(np.int32)
    samples = [rng.integers(260, 512, 120) for _ in range(20)]  # no token in common with the training text
    for sample, document, at, length in ((3, 5, 0, 50), (4, 6, 100, 49), (9, 11, 250, 50), (10, 0, 20, 80)):
        samples[sample][20 : 20 + length] = training[document, at : at + length]
    samples[12][:60] = np.concatenate([training[1, -30:], training[2, :30]])  # across the edge of two documents
    return write_corpus(tmp_path / "corpus", tiny_model(), samples), training


@pytest.mark.parametrize("block", [overlap.QUERY_BLOCK, 700])
def test_planted_matches_are_found_and_only_those(tmp_path, planted_corpus, block, monkeypatch):
    monkeypatch.setattr(overlap, "QUERY_BLOCK", block)  # the smaller one makes several passes over the text
    corpus, training = planted_corpus
    np.save(tmp_path / "training.npy", training)
    out = tmp_path / "leaks.json"
    result = measure_leakage(LeakageConfig(corpus=corpus, texts=str(tmp_path / "training.npy"), out=str(out)))
    assert json_files.read_json(out) == result
    assert (result["samples"], result["leaking_samples"], result["leak_rate"]) == (20, 3, 0.15)
    assert result["leak_rate_interval"] == wilson_interval([True] * 3 + [False] * 17)
    assert (result["longest"], result["covered_tokens"], result["tokens"]) == (80, 180, 2400)
    assert (result["texts"]["documents"], result["texts"]["tokens"]) == (12, 3600)
    table = pq.read_table(tmp_path / "leaks.samples.parquet").to_pylist()
    found = {row["sample_id"]: row for row in table if row["longest"]}
    assert set(found) == {3, 9, 10}
    assert found[10] == {
        "sample_id": 10, "tokens": 120, "longest": 80, "start": 20, "document": 0, "document_start": 20, "covered": 80,
    }  # fmt: skip
    assert (found[9]["document"], found[9]["document_start"]) == (11, 250)
    shorter = measure_leakage(
        LeakageConfig(corpus=corpus, texts=str(tmp_path / "training.npy"), out=str(out), min_match=30)
    )
    assert shorter["leaking_samples"] == 5
    assert shorter["covered_tokens"] == 180 + 49 + 60


def test_one_long_stream_of_tokens_is_one_document(tmp_path, planted_corpus):
    corpus, training = planted_corpus
    np.save(tmp_path / "training.npy", training.reshape(-1))
    config = LeakageConfig(corpus=corpus, texts=str(tmp_path / "training.npy"), out=str(tmp_path / "leaks.json"))
    assert measure_leakage(config)["leaking_samples"] == 4  # the run across the edge of two documents counts now


def test_a_training_text_as_text_as_a_corpus_and_in_another_tokenizer(tmp_path, tiny_model):
    """Two of six samples are training documents, one is half of one."""
    model, other = tiny_model(), tiny_model(vocab_size=400)
    stories = list(tiny_texts(8, seed=3))
    texts = tmp_path / "training.jsonl"
    texts.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories[:5]))
    tokenizer = hub.open_model(model).tokenizer
    samples = [tokenizer.encode(stories[i], add_special_tokens=False) for i in (5, 1, 6, 2, 7, 3)]
    samples[5] = samples[5][: len(samples[5]) // 2]
    corpus = write_corpus(tmp_path / "corpus", model, samples)
    for name, imported_by in (("same", model), ("foreign", other)):
        import_text(ImportCorpusConfig(source=str(texts), model=str(imported_by), out=str(tmp_path / name)))
    length = len(samples[5]) - 2
    found = []
    for source in (texts, tmp_path / "same", tmp_path / "foreign"):
        out = tmp_path / f"{source.name}.json"
        words = ["--corpus", corpus, "--texts", str(source), "--out", str(out), "--min-match", str(length)]
        assert cli.main(["leakage", *words, "--tokenizer", str(model)]) == 0
        found.append(json_files.read_json(out))
        rows = pq.read_table(tmp_path / f"{source.name}.samples.parquet")
        assert [row["document"] for row in rows.to_pylist()][1::2] == [1, 2, 3]
    assert [result["leaking_samples"] for result in found] == [found[0]["leaking_samples"]] * 3
    assert found[0]["leaking_samples"] >= 3
    assert [result["texts"]["documents"] for result in found] == [5, 5, 5]
    with pytest.raises(InputError, match=r"name a model that has the corpus's tokenizer with --tokenizer"):
        measure_leakage(LeakageConfig(corpus=corpus, texts=str(tmp_path / "foreign"), out=str(tmp_path / "x.json")))
