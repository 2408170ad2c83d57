"""Extraction where the truth is planted: greedy paths, overlaps of known length, probabilities summed by hand."""

import json
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jax_selftrain import hub
from jax_selftrain.config import ExtractConfig
from jax_selftrain.corpus import Sample, finish_corpus, write_shard
from jax_selftrain.errors import InputError
from jax_selftrain.sampling import greedy_continue
from jax_selftrain.scoring import classify, discoverable, extract, measure, summarise

PREFIX, SUFFIX = 8, 24
BATCH = 1024


@pytest.fixture(scope="module")
def model(tiny_model):
    return hub.load_model(tiny_model(), "data=1")


@pytest.fixture(scope="module")
def greedy_paths(model):
    """32 sequences whose suffix is what the model itself says."""
    prefixes = np.random.default_rng(0).integers(3, 512, (32, PREFIX)).astype(np.int32)
    return np.concatenate([prefixes, np.asarray(greedy_continue(model, prefixes, SUFFIX))], axis=1)


@pytest.fixture(scope="module")
def random_sequences():
    return np.random.default_rng(1).integers(3, 512, (32, PREFIX + SUFFIX)).astype(np.int32)


@pytest.fixture
def options(tmp_path, tiny_model):
    def make(array, **changes) -> ExtractConfig:
        file = tmp_path / "sequences.npy"
        np.save(file, array)
        given: dict[str, Any] = {
            "model": str(tiny_model()),
            "sequences": str(file),
            "out": str(tmp_path / "out" / "extraction.json"),
            "prefix": PREFIX,
            "suffix": SUFFIX,
            "mesh": "data=1",
            "batch_tokens": BATCH,
        }
        return ExtractConfig(**(given | changes))

    return make


def test_greedy_paths_are_extracted_and_random_sequences_are_not(options, greedy_paths, random_sequences):
    known = extract(options(greedy_paths))
    assert (known["n"], known["exact_match"], known["token_accuracy"]) == (32, 1.0, 1.0)
    assert known["teacher_forced_accuracy"] == 1.0
    assert known["matched_tokens"] == SUFFIX
    unknown = extract(options(random_sequences))
    assert unknown["exact_match"] == 0.0
    assert unknown["token_accuracy"] < 0.1  # a token is right by chance once in 512
    assert unknown["exact_match_interval"] == pytest.approx([0.0, 0.1072], abs=1e-3)  # Wilson, 0 of 32
    assert "held_out" not in unknown  # no corpus, no classes


def test_one_wrong_token_breaks_the_path_where_it_stands(model, greedy_paths):
    changed = greedy_paths.copy()
    places = np.arange(32) % SUFFIX
    changed[np.arange(32), PREFIX + places] = (changed[np.arange(32), PREFIX + places] + 1) % 512
    measured = measure(model, changed, PREFIX, batch_tokens=BATCH)
    assert not measured["exact_match"].any()
    assert measured["matched_tokens"].tolist() == places.tolist()
    # The free-running continuation is the unchanged path: it misses exactly the one token.
    np.testing.assert_allclose(measured["token_accuracy"], 1 - 1 / SUFFIX)


def test_exact_match_is_what_free_running_decoding_finds(model, greedy_paths, random_sequences):
    sequences = np.concatenate([greedy_paths, random_sequences])
    sequences[::4, -1] = (sequences[::4, -1] + 1) % 512
    measured = measure(model, sequences, PREFIX, batch_tokens=BATCH)
    decoded = np.asarray(greedy_continue(model, sequences[:, :PREFIX], SUFFIX))
    same = decoded == sequences[:, PREFIX:]
    assert measured["exact_match"].tolist() == same.all(axis=1).tolist()
    np.testing.assert_array_equal(measured["token_accuracy"], same.mean(axis=1))
    agreed = [int(np.argmin(row)) if not row.all() else SUFFIX for row in same]
    assert measured["matched_tokens"].tolist() == agreed


def test_p_z_is_the_product_of_the_suffix_probabilities(model, greedy_paths, random_sequences):
    sequences = np.concatenate([greedy_paths[:4], random_sequences[:4]])
    measured = measure(model, sequences, PREFIX, batch_tokens=BATCH)
    logits = np.asarray(model.logits(sequences), np.float64)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    at = np.arange(PREFIX, PREFIX + SUFFIX)
    products = [np.prod(probabilities[row, at - 1, sequence[at]]) for row, sequence in enumerate(sequences)]
    np.testing.assert_allclose(np.exp(measured["logprob"]), products, rtol=1e-4)  # 24 factors, each right to 1e-6


def test_discoverable_follows_the_definition_and_survives_tiny_probabilities():
    p_z = np.array([0.0, 1e-5, 1e-3, 0.05, 0.5, 0.95, 1.0])
    with np.errstate(divide="ignore"):
        found = discoverable(np.log(p_z))
    for key, flags in found.items():
        n, p = key.split("@")
        assert flags.tolist() == (1 - (1 - p_z) ** int(n) >= float(p)).tolist(), key
    assert set(found) >= {"1@0.5", "1@0.1", "10000@0.9"}
    # 1 − p_z is 1 in floating point here, and yet 10^4 tries find it with probability 10^4·p_z.
    assert not discoverable(np.array([np.log(1e-6)]))["10000@0.1"].any()
    assert discoverable(np.array([np.log(1.06e-5)]))["10000@0.1"].all()  # log1p(−0.1)/10^4 = −1.0536e-5
    assert not discoverable(np.array([np.log(1.05e-5)]))["10000@0.1"].any()
    assert not discoverable(np.array([-1e4]))["10000@0.1"].any()


def test_classes_by_overlap():
    found = classify(np.array([0, 15, 16, 23, 24]), 24, 16)
    assert found.tolist() == ["held_out", "held_out", "partial", "partial", "seen"]
    assert classify(np.array([7, 8]), 8, 16).tolist() == ["held_out", "seen"]  # a whole short suffix was seen


def test_an_empty_class_has_no_numbers(model, greedy_paths):
    measured = measure(model, greedy_paths[:2], PREFIX, batch_tokens=BATCH)
    nothing = summarise(measured, np.zeros(2, bool))
    assert nothing["n"] == 0
    assert nothing["exact_match"] is None
    assert nothing["discoverable"]["1@0.5"] is None


def make_corpus(folder, tiny_folder, documents) -> str:
    """A corpus of ours that holds exactly these token lists."""
    samples = [
        Sample(sample_id, np.asarray(tokens, np.int32), "", -1.0, "length")
        for sample_id, tokens in enumerate(documents)
    ]
    write_shard(folder, 0, samples, {})
    finish_corpus(
        folder,
        {
            "kind": "sampled",
            "source": {"ref": "here", "fingerprint": "0" * 64},
            "tokenizer_fingerprint": hub.tokenizer_fingerprint(tiny_folder),
            "start_id": 1,
            "stop_ids": [2],
            "policy": {},
            "seed": 0,
            "samples": len(samples),
            "samples_per_shard": len(samples),
            "retokenisation_mismatches": 0,
        },
    )
    return str(folder)


def test_planted_overlaps_of_15_16_17_tokens_are_classed(tmp_path, tiny_model, options, greedy_paths, random_sequences):
    rng = np.random.default_rng(2)
    sequences = np.concatenate([greedy_paths[:4], random_sequences[:4]])
    planted = [15, 16, 17, 24, 0, 15, 23, 24]
    documents = [rng.integers(3, 512, 40) for _ in range(3)]
    for i, (row, length) in enumerate(zip(sequences, planted, strict=True)):
        begin = PREFIX + (SUFFIX - length) * (i % 2)  # at the front or at the back of the suffix
        run = row[begin : begin + length]
        documents.append(np.concatenate([[2], run, [2]]))  # 2 is in no sequence, so nothing joins on
    # Prefixes do not count, and neither does a run that two documents share between them.
    documents += [sequences[4][:PREFIX], sequences[4][PREFIX : PREFIX + 10], sequences[4][PREFIX + 10 :]]
    corpus = make_corpus(tmp_path / "corpus", tiny_model(), documents)
    result = extract(options(sequences, corpus=corpus))
    table = pq.read_table(tmp_path / "out" / "extraction.sequences.parquet").to_pydict()
    assert table["overlap"] == [15, 16, 17, 24, 14, 15, 23, 24]
    assert table["class"] == [
        "held_out", "partial", "partial", "seen", "held_out", "held_out", "partial", "seen",
    ]  # fmt: skip
    assert [result[name]["n"] for name in ("held_out", "partial", "seen")] == [3, 3, 2]
    assert result["held_out"]["exact_match"] == pytest.approx(1 / 3)
    assert result["partial"]["exact_match"] == pytest.approx(2 / 3)
    assert result["seen"]["exact_match"] == 0.5
    assert result["exact_match"] == 0.5
    assert result["exact_match_stderr"] == pytest.approx(np.sqrt(0.25 / 7))


def test_extract_writes_what_it_returns_and_again_the_same_bytes(tmp_path, options, random_sequences):
    config = options(random_sequences)
    result = extract(config)
    folder = tmp_path / "out"
    assert json.loads((folder / "extraction.json").read_text()) == result
    names = [name for name in sorted(path.name for path in folder.iterdir()) if "timings" not in name]
    assert names == ["extraction.config.yaml", "extraction.json", "extraction.sequences.parquet"]
    before = [(folder / name).read_bytes() for name in names]
    extract(config)
    assert [(folder / name).read_bytes() for name in names] == before


def test_sequences_come_as_tokens_or_text_too(tmp_path, tiny_model, options, model):
    text = "Once there was a big fox named Kalo. Kalo found a red ball near the river. " * 2
    tokens = model.tokenizer.encode(text, add_special_tokens=False)[: PREFIX + SUFFIX]
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps({"tokens": tokens}) + "\n" + json.dumps({"text": text}) + "\n")
    extract(options(np.zeros((1, 1)), sequences=str(file), limit=2))
    table = pq.read_table(tmp_path / "out" / "extraction.sequences.parquet").to_pydict()
    assert table["logprob"][0] == table["logprob"][1]
    direct = extract(options(np.array([tokens, tokens]), limit=1))
    assert direct["n"] == 1
    assert direct["logprob"] == pytest.approx(table["logprob"][0])


@pytest.mark.parametrize(
    ("array", "changes", "message"),
    [
        (np.zeros((2, 31), np.int32), {}, "31 tokens, fewer than prefix \\+ suffix = 32"),
        (np.zeros((2, 32), np.float32), {}, "must be an integer array"),
        (np.zeros(32, np.int64), {}, "must be an integer array"),
        (np.zeros((0, 32), np.int64), {}, "no sequences"),
        (np.full((2, 32), 512), {}, "token id 512 of sequence 0 is outside"),
        (np.full((2, 32), 2**40), {}, "outside the model's vocabulary"),
        (np.full((2, 32), -1), {}, "token id -1"),
        (np.array([[{}] * 32], dtype=object), {}, "without pickled objects"),
        (np.zeros((2, 2000), np.int32), {"prefix": 1001}, r"longer than the 1024 positions"),
        (np.zeros((2, 32), np.int32), {"suffix": 0}, "--suffix is 0"),
        (np.zeros((2, 32), np.int32), {"sequences": "nothing.npy"}, "no such file"),
        (np.zeros((2, 32), np.int32), {"corpus": "nowhere"}, "nowhere"),
    ],
)
def test_unusable_input_is_refused_and_nothing_written(tmp_path, options, array, changes, message):
    with pytest.raises(InputError, match=message):
        extract(options(array, **changes))
    assert not (tmp_path / "out").exists()


def test_unusable_jsonl_is_refused_with_its_line(tmp_path, options):
    for line, message in (
        ({"tokens": [3] * 31}, "set.jsonl:1: 31 tokens, fewer"),
        ({"tokens": ["a"] * 32}, "whole numbers"),
        ({"tokens": [2**40] * 32}, "32 bits"),
        ({"story": "a"}, "neither `tokens` nor `text`"),
    ):
        (tmp_path / "set.jsonl").write_text(json.dumps(line) + "\n")
        with pytest.raises(InputError, match=message):
            extract(options(np.zeros((1, 1)), sequences=str(tmp_path / "set.jsonl")))
