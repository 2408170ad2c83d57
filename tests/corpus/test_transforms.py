"""Retokenized corpora keep the text and count losses; shuffled ones keep tokens."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from corpus_factory import write_sampled_corpus
from models_factory import tiny_texts

from jax_selftrain import hub
from jax_selftrain.corpus import Corpus, Sample, retokenize, shuffle
from jax_selftrain.errors import InputError

Tiny = Callable[..., Path]


@pytest.fixture
def source(tiny_model: Tiny, tmp_path: Path) -> Corpus:
    """Ten stories for a Llama, with truncation, special strings and broken bytes."""
    model = tiny_model("llama")
    tokenizer, samples = hub.open_model(model).tokenizer, []
    texts = [*tiny_texts(8, seed=2), "a </s> b <s>", "half \N{REPLACEMENT CHARACTER} a character"]
    for i, text in enumerate(texts):
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        stop = i % 2 == 0
        row = np.array([*ids, *([2] if stop else [])], np.int32)
        samples.append(Sample(i, row, text, -1.0, "stop" if stop else "length"))
    return write_sampled_corpus(tmp_path / "source", model, samples, per_shard=4, seed=5)


def test_the_same_tokenizer_gives_the_same_tokens_and_says_what_it_lost(
    source: Corpus, tiny_model: Tiny, tmp_path: Path
):
    carried = retokenize(source.folder, str(tiny_model("llama")), tmp_path / "out")
    pairs = list(zip(source.iter_samples(), carried.iter_samples(), strict=True))
    for before, after in pairs[:-1]:
        assert after.tokens.tolist() == before.tokens.tolist()
        assert (after.text, after.finish_reason) == (before.text, before.finish_reason)
        assert np.isnan(after.logprob)
    assert pairs[-1][1].text == "half  a character"
    counts = carried.manifest["retokenized"]
    assert counts["changed"] == counts["broken_characters"] == 1
    assert counts["empty"] == 0
    assert counts["source_tokens"] == source.n_tokens
    assert counts["text_bytes"] == sum(len(text.encode()) for text in carried.iter_texts())


def test_another_tokenizer_reads_the_text_directly(source: Corpus, tiny_model: Tiny, tmp_path: Path):
    other = tiny_model("gpt_neox", vocab_size=320)
    carried = retokenize(source.folder, str(other), tmp_path / "out")
    tokenizer = hub.open_model(other).tokenizer
    special = hub.open_model(other).special_tokens
    assert carried.start_id == special.bos_token_id
    assert carried.manifest["tokenizer_fingerprint"] == hub.open_model(other).tokenizer_fingerprint
    for before, after in zip(source.iter_samples(), carried.iter_samples(), strict=True):
        text = before.text.replace("\N{REPLACEMENT CHARACTER}", "")
        expected = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert after.tokens.tolist() == [
            *expected,
            *(carried.manifest["stop_ids"] if before.finish_reason == "stop" else ()),
        ]
    assert carried.manifest["retokenized"]["changed"] == 0  # of another tokenizer there is nothing to compare


def test_a_model_may_end_its_texts_with_another_token(source: Corpus, tiny_model: Tiny, tmp_path: Path):
    carried = retokenize(source.folder, str(tiny_model("llama")), tmp_path / "out", stop_id=1)
    assert carried.manifest["stop_ids"] == [1]
    for sample in carried.iter_samples():
        assert (sample.tokens[-1] == 1) == (sample.finish_reason == "stop")


def test_an_interrupted_one_is_completed_with_the_same_bytes(source: Corpus, tiny_model: Tiny, tmp_path: Path):
    model = str(tiny_model("llama"))
    whole = retokenize(source.folder, model, tmp_path / "whole")
    part = retokenize(source.folder, model, tmp_path / "part")
    (part.folder / "corpus.json").unlink()
    (part.folder / "shard-000001.parquet").unlink()
    assert retokenize(source.folder, model, tmp_path / "part").fingerprint == whole.fingerprint
    with pytest.raises(InputError, match="was created with"):
        retokenize(source.folder, str(tiny_model("gpt_neox", vocab_size=320)), tmp_path / "part")


def test_shuffled_documents_keep_their_tokens_and_their_end(source: Corpus, tiny_model: Tiny, tmp_path: Path):
    model = str(tiny_model("llama"))
    one, again, other = (
        shuffle(source.folder, model, tmp_path / name, seed) for name, seed in zip("abc", (1, 1, 2), strict=False)
    )
    assert one.fingerprint == again.fingerprint != other.fingerprint
    for before, after in zip(source.iter_samples(), one.iter_samples(), strict=True):
        assert sorted(after.tokens.tolist()) == sorted(before.tokens.tolist())
        assert len(before.tokens) < 8 or after.tokens.tolist() != before.tokens.tolist()
        assert after.finish_reason == before.finish_reason
        assert (after.tokens[-1] == 2) == (before.finish_reason == "stop")
    with pytest.raises(InputError, match="another tokenizer"):
        shuffle(source.folder, str(tiny_model("gpt_neox", vocab_size=320)), tmp_path / "d", 1)
