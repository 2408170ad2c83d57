"""Corpus statistics equal those counted by hand, at constant memory."""

import itertools
import json
import math
import statistics
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from jax_selftrain import hub
from jax_selftrain.config import ImportCorpusConfig
from jax_selftrain.corpus import Corpus, CorpusWriter, Sample, import_text, open_corpus
from jax_selftrain.corpus.statistics import RARE_FREQUENCY, corpus_statistics, tail_statistics
from jax_selftrain.io import json_files

MANIFEST = {
    "kind": "sampled",
    "source": {"ref": "model", "fingerprint": "f" * 64},
    "tokenizer_fingerprint": "a" * 64,
    "start_id": 1,
    "stop_ids": [2],
    "policy": {"temperature": 1.0},
    "seed": 0,
}
NAN = float("nan")


def write(folder: Path, samples: Sequence[Sample], per_shard: int = 4, order=None, **record) -> Corpus:
    """Write the samples as a corpus."""
    writer = CorpusWriter.open(folder, {**MANIFEST, "samples": len(samples), "samples_per_shard": per_shard})
    for index in order or range(len(writer.shards)):
        ids = writer.sample_ids(index)
        writer.write_shard(index, samples[ids.start : ids.stop], record)
    return writer.finalize()


def sample(sample_id: int, tokens: ArrayLike, logprob: float = -1.0, reason: str = "stop") -> Sample:
    return Sample(sample_id, np.array(tokens, np.int32), "", logprob, reason)


def measure(folder: Path, documents: Sequence[ArrayLike], **record) -> dict:
    samples = [sample(i, tokens) for i, tokens in enumerate(documents)]
    return write(folder, samples, **record).manifest["statistics"]


def count(samples: Sequence[Sample]) -> dict:
    """The same statistics by loops over tuples."""
    texts = [tuple(s.tokens.tolist()) for s in samples]
    lengths = [len(text) for text in texts]
    grams = {n: Counter(text[i : i + n] for text in texts for i in range(len(text) - n + 1)) for n in (1, 2, 3, 4)}
    known = sum(lengths) > 0 and not any(math.isnan(s.logprob) for s in samples)
    return {
        "length": {
            "mean": statistics.mean(lengths),
            "std": statistics.pstdev(lengths),
            "min": min(lengths),
            "median": statistics.median(lengths),
            "max": max(lengths),
        },
        "stopped": sum(s.finish_reason == "stop" for s in samples) / len(samples),
        "nll_per_token": -sum(s.logprob for s in samples) / sum(lengths) if known else None,
        "entropy_per_token": None,
        "distinct": {"tokens": sum(lengths)}
        | {str(n): len(seen) / seen.total() if seen else None for n, seen in grams.items()},
        "duplicates": sum(text in texts[:i] for i, text in enumerate(texts)) / len(texts),
    }


def assert_same(found: dict, expected: dict) -> None:
    """Compare numbers up to the sixth decimal."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_same(found[key], value)
        else:
            assert found[key] == (None if value is None else pytest.approx(value, rel=0, abs=0.51e-6)), key


# ---------------------------------------------------------------- against counting by hand


def test_a_corpus_small_enough_to_count_on_paper(tmp_path):
    """Nine bigrams, four of them distinct: 56 67 75, 56 67, …."""
    documents = [
        ([5, 6, 7, 5], -4.0, "stop"),
        ([5, 6, 7], -2.5, "length"),
        ([5, 6, 7, 5], -4.0, "length"),
        ([5, 9], -1.5, "stop"),
    ]
    samples = [sample(i, *document) for i, document in enumerate(documents)]
    write(tmp_path, samples, per_shard=2, policy_logprob=-3.25)
    assert json_files.read_json(tmp_path / "corpus.json")["statistics"] == {
        "length": {"mean": 3.25, "std": 0.829156, "min": 2, "median": 3.5, "max": 4},  # std = √(11/16)
        "stopped": 0.5,
        "nll_per_token": 0.923077,  # 12/13
        "entropy_per_token": 0.5,  # 6.5/13
        "distinct": {"tokens": 13, "1": 0.307692, "2": 0.444444, "3": 0.4, "4": 0.5},  # 4/13, 4/9, 2/5, 1/2
        "duplicates": 0.25,
    }


documents_strategy = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), max_size=7), st.floats(-50, 0, width=32), st.sampled_from(["stop", "length"])
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=60)
@given(documents=documents_strategy)
def test_statistics_are_those_of_counting_by_hand(documents):
    samples = [sample(i, *document) for i, document in enumerate(documents)]
    with tempfile.TemporaryDirectory() as folder:
        assert_same(write(Path(folder), samples).manifest["statistics"], count(samples))


def test_large_ids_and_many_batches_are_counted_by_hand_too(tmp_path):
    rng = np.random.Generator(np.random.Philox(3))
    lengths = rng.integers(1, 12, 3000)
    ids = rng.integers(2**31 - 30, 2**31, lengths.sum())  # the largest that the schema holds
    samples = [
        sample(i, tokens, float(-len(tokens) * rng.random()), "stop" if i % 3 else "length")
        for i, tokens in enumerate(np.split(ids, np.cumsum(lengths)[:-1]))
    ]
    assert_same(write(tmp_path, samples, per_shard=1700).manifest["statistics"], count(samples))


# ---------------------------------------------------------------- numbers that there are not


def test_a_single_token_has_no_longer_ngrams(tmp_path):
    found = measure(tmp_path, [[3]])
    assert found["distinct"] == {"tokens": 1, "1": 1.0, "2": None, "3": None, "4": None}
    assert found["length"] == {"mean": 1.0, "std": 0.0, "min": 1, "median": 1.0, "max": 1}
    assert (found["nll_per_token"], found["duplicates"]) == (1.0, 0.0)


def test_samples_without_tokens_have_lengths_and_nothing_per_token(tmp_path):
    found = measure(tmp_path, [[], []], policy_logprob=0.0)
    assert found["length"]["max"] == 0
    assert found["distinct"] == {"tokens": 0, "1": None, "2": None, "3": None, "4": None}
    assert (found["nll_per_token"], found["entropy_per_token"], found["duplicates"]) == (None, None, 0.5)


def test_what_one_sample_or_one_shard_does_not_tell_the_corpus_does_not(tmp_path):
    samples = [sample(i, [3, 4], NAN if i == 5 else -1.0) for i in range(8)]
    corpus = write(tmp_path, samples, policy_logprob=-2.0)
    found = corpus.manifest["statistics"]
    assert (found["nll_per_token"], found["entropy_per_token"]) == (None, 0.25)
    assert corpus_statistics(corpus, [-2.0, None])["entropy_per_token"] is None
    assert write(tmp_path / "unknown", samples).manifest["statistics"]["entropy_per_token"] is None


def test_a_policy_without_choice_has_no_entropy(tmp_path):
    found = measure(tmp_path, [[3, 4], [3, 4]], policy_logprob=-0.0)
    assert str(found["entropy_per_token"]) == "0.0"
    assert found["duplicates"] == 0.5


def test_an_imported_corpus_has_statistics_but_for_what_only_a_source_can_tell(tmp_path, tiny_model):
    model = str(tiny_model("llama"))
    texts = ["the cat sat", "a dog", "the cat sat", "one more text that is too long to be kept whole"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = import_text(ImportCorpusConfig(str(tmp_path / "t.jsonl"), model, str(tmp_path / "c"), max_tokens=12))
    samples = list(corpus.iter_samples())
    found = corpus.manifest["statistics"]
    assert_same(found, count(samples))
    assert (found["nll_per_token"], found["entropy_per_token"], found["duplicates"]) == (None, None, 0.25)
    tokenizer = hub.open_model(model).tokenizer
    whole = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) < 12 for text in texts]
    assert 0 < found["stopped"] == sum(whole) / 4 < 1


# ---------------------------------------------------------------- determinism


def test_the_manifest_does_not_depend_on_who_wrote_which_shard_when_and_where(tmp_path):
    rng = np.random.Generator(np.random.Philox(1))
    samples = [sample(i, rng.integers(0, 9, 6), -rng.random()) for i in range(10)]
    for name, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
        write(tmp_path / name, samples, order=order, mesh=name, policy_logprob=-1.1)
    assert (tmp_path / "a" / "corpus.json").read_bytes() == (tmp_path / "b" / "corpus.json").read_bytes()


def test_shards_of_other_sizes_hold_a_corpus_of_the_same_statistics(tmp_path):
    rng = np.random.Generator(np.random.Philox(2))
    samples = [sample(i, rng.integers(0, 9, 6), -rng.random()) for i in range(10)]
    found = [write(tmp_path / str(n), samples, n).manifest["statistics"] for n in (1, 3, 10)]
    assert found[0] == found[1] == found[2]


def test_a_corpus_made_before_there_were_statistics_opens_and_can_be_measured(tmp_path, make_corpus, documents):
    corpus = make_corpus(tmp_path, documents)
    manifest = json_files.read_json(tmp_path / "corpus.json")
    expected = manifest.pop("statistics")
    json_files.write_json(tmp_path / "corpus.json", manifest)
    old = open_corpus(tmp_path)
    assert len(old) == len(corpus)
    assert corpus_statistics(old) == expected


# ---------------------------------------------------------------- large corpora


def test_distinct_ngrams_are_counted_on_whole_samples_from_the_start_up_to_a_fixed_size(tmp_path):
    """The first sample that does not fit ends the count."""
    size = 2**18
    half = np.arange(size // 2)
    fits = measure(tmp_path / "fits", [half, half + size, [0, 0]])["distinct"]
    assert fits == {"tokens": size, "1": 1.0, "2": 1.0, "3": 1.0, "4": 1.0}
    too_long = measure(tmp_path / "long", [half, [*half, 0], [0, 0]])["distinct"]
    assert too_long["tokens"] == size // 2
    repeated = measure(tmp_path / "repeated", [half, half, [0, 0]])["distinct"]
    assert repeated == {"tokens": size, "1": 0.5, "2": 0.5, "3": 0.5, "4": 0.5}


def test_memory_does_not_grow_with_the_corpus_but_for_eight_bytes_a_sample(tmp_path, monkeypatch):
    """The constant memory of n-gram counting is made small here."""
    monkeypatch.setattr("jax_selftrain.corpus.statistics.DISTINCT_TOKENS", 1 << 12)
    rows, length = 4096, 300
    tokens = np.random.Generator(np.random.Philox(5)).integers(0, 50_000, (rows, length))
    corpus = write(tmp_path, [sample(i, row) for i, row in enumerate(tokens)], per_shard=rows)

    def peak(repeats: int) -> tuple[int, int]:
        """Return the peak bytes of Python, NumPy and Arrow for repeated shards."""
        repeated = Corpus(tmp_path, {"samples": repeats * rows, "shards": repeats * corpus.manifest["shards"]})
        before = pa.default_memory_pool()
        pool = pa.proxy_memory_pool(before)
        pa.set_memory_pool(pool)
        tracemalloc.start()
        try:
            found = corpus_statistics(repeated)
            held = tracemalloc.get_traced_memory()[1], pool.max_memory()
        finally:
            tracemalloc.stop()
            pa.set_memory_pool(before)
        assert found["duplicates"] == 1 - 1 / repeats
        return held

    peak(1)  # whatever is loaded or cached at first use
    once, often = peak(1), peak(20)
    assert often[0] - once[0] < 19 * rows * 8 + 100_000, "100 kB for garbage that is not yet collected"
    assert 0 < often[1] < once[1] + 2_000_000, "Arrow reads ahead by some pages, depending on its threads"


def test_tails_are_of_equally_many_tokens_and_rare_by_other_tokens_than_their_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frequencies = 1 / np.arange(1, 3001) ** 1.1
    corpora, documents = [], []
    for name, kept in (("first", 3000), ("later", 300)):  # the later corpus has lost its tail
        p = frequencies[:kept] / frequencies[:kept].sum()
        rows = [rng.choice(kept, rng.integers(1, 40), p=p).astype(np.int32) for _ in range(2500)]
        documents.append(rows)
        samples = [Sample(n, row, "", NAN, "length") for n, row in enumerate(rows)]
        corpora.append(write(tmp_path / name, samples, per_shard=1000))
    n = 20_000
    first, later = (tail_statistics(corpus, corpora[0], n) for corpus in corpora)
    reference = Counter(np.concatenate(documents[0])[n : 2 * n].tolist())
    for found, rows in ((first, documents[0]), (later, documents[1])):
        text = np.concatenate(rows)[:n].tolist()
        counts = Counter(text)
        entropy = -sum(count / n * math.log(count / n) for count in counts.values())
        rare = sum(count for token, count in counts.items() if reference[token] < RARE_FREQUENCY * n) / n
        cut, left = [], n
        for row in rows:
            cut.append(row.tolist()[:left])
            left -= len(cut[-1])
        pairs = [pair for row in cut for pair in itertools.pairwise(row)]
        assert found["unigram_entropy"] == pytest.approx(entropy, abs=1e-6)
        assert found["rare_mass"] == pytest.approx(rare, abs=1e-6)
        assert found["distinct"]["tokens"] == n
        assert found["distinct"]["2"] == pytest.approx(len(set(pairs)) / len(pairs), abs=1e-6)
    assert later["rare_mass"] == 0 < first["rare_mass"]
    assert later["unigram_entropy"] < first["unigram_entropy"]
    # Tokens that define the rare ones have fewer of them than the same author's next tokens.
    selected = tail_statistics(
        write(tmp_path / "shifted", [Sample(0, np.concatenate(documents[0])[n:], "", NAN, "length")]), corpora[0], n
    )
    assert selected["rare_mass"] < first["rare_mass"]
