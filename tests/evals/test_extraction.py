"""Extraction of planted sequences: greedy paths, known overlaps, summed probabilities."""

import json
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpus_factory import write_sampled_corpus
from extraction_reference import (
    BATCH,
    GREEDY,
    PREFIX,
    SUFFIX,
    classify_overlap,
    compute_log_pz,
    draw_greedy_paths,
    draw_random_sequences,
    longest_runs,
)
from models_factory import tiny_texts

from jax_selftrain import hub
from jax_selftrain.config import ExtractConfig, ImportCorpusConfig, SampleConfig
from jax_selftrain.corpus import Sample, import_text, open_corpus
from jax_selftrain.errors import InputError
from jax_selftrain.evals import extract, extraction_metrics, make_window
from jax_selftrain.evals.extraction import classify, load_extraction_sets, summarize
from jax_selftrain.io import json_files
from jax_selftrain.sampling import generate, sample

CLASSES = ("held_out", "partial", "seen")


@pytest.fixture(scope="module")
def model(tiny_model):
    return hub.load_model(tiny_model(), "data=1")


@pytest.fixture(scope="module")
def greedy_paths(model):
    return draw_greedy_paths(model)


@pytest.fixture(scope="module")
def random_sequences():
    return draw_random_sequences()


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


def test_one_wrong_token_ends_the_match_at_its_position(model, greedy_paths):
    changed = greedy_paths.copy()
    wrong = np.arange(32) % SUFFIX
    changed[np.arange(32), PREFIX + wrong] = (changed[np.arange(32), PREFIX + wrong] + 1) % 512
    measured = extraction_metrics(model, changed, PREFIX, batch_tokens=BATCH)
    assert not measured["exact_match"].any()
    assert measured["matched_tokens"].tolist() == wrong.tolist()
    # The greedy continuation is the unchanged path, without the one token.
    np.testing.assert_allclose(measured["token_accuracy"], 1 - 1 / SUFFIX)


def test_exact_match_equals_that_of_greedy_decoding(model, greedy_paths, random_sequences):
    sequences = np.concatenate([greedy_paths, random_sequences])
    sequences[::4, -1] = (sequences[::4, -1] + 1) % 512
    measured = extraction_metrics(model, sequences, PREFIX, batch_tokens=BATCH)
    decoded = np.array(generate(model, sequences[:, :PREFIX].tolist(), GREEDY))
    same = decoded == sequences[:, PREFIX:]
    assert measured["exact_match"].tolist() == same.all(axis=1).tolist()
    np.testing.assert_array_equal(measured["token_accuracy"], same.mean(axis=1))
    agreed = [int(np.argmin(row)) if not row.all() else SUFFIX for row in same]
    assert measured["matched_tokens"].tolist() == agreed


def test_without_decoding_only_measures_of_the_continuation_are_missing(options, greedy_paths, random_sequences):
    both = np.concatenate([greedy_paths, random_sequences])
    whole, quick = (extract(options(both, greedy_decode=decoded)) for decoded in (True, False))
    for name in ("token_accuracy", "edit_distance", "approximate_match", "longest_common_subsequence"):
        assert quick.pop(name) is quick.pop(f"{name}_stderr") is None
        assert 0 < whole.pop(name) < 1
        del whole[f"{name}_stderr"]
    assert quick == whole


def test_p_z_is_the_product_of_the_suffix_probabilities(model, greedy_paths, random_sequences):
    sequences = np.concatenate([greedy_paths[:4], random_sequences[:4]])
    measured = extraction_metrics(model, sequences, PREFIX, batch_tokens=BATCH)
    logits = np.asarray(model.logits(sequences), np.float64)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    at = np.arange(PREFIX, PREFIX + SUFFIX)
    products = [np.prod(probabilities[row, at - 1, sequence[at]]) for row, sequence in enumerate(sequences)]
    np.testing.assert_allclose(np.exp(measured["logprob"]), products, rtol=1e-4)  # 24 factors, each right to 1e-6


def test_classes_by_overlap():
    found = classify(np.array([0, 15, 16, 23, 24]), 24, 16)
    assert found.tolist() == ["held_out", "held_out", "partial", "partial", "seen"]
    assert classify(np.array([7, 8]), 8, 16).tolist() == ["held_out", "seen"]  # a whole short suffix was seen


def test_an_empty_class_has_no_means(model, greedy_paths):
    measured = extraction_metrics(model, greedy_paths[:2], PREFIX, batch_tokens=BATCH)
    empty = summarize(measured, np.zeros(2, bool))
    assert empty["n"] == 0
    assert empty["exact_match"] is None
    assert empty["discoverable"]["1@0.5"] is None


def make_corpus(folder, model_folder, documents) -> str:
    """Write a sampled corpus of these token lists."""
    samples = [
        Sample(sample_id, np.asarray(tokens, np.int32), "", -1.0, "length")
        for sample_id, tokens in enumerate(documents)
    ]
    return str(write_sampled_corpus(folder, model_folder, samples).folder)


def test_planted_overlaps_of_15_16_17_tokens_are_classified(
    tmp_path, tiny_model, options, greedy_paths, random_sequences
):
    rng = np.random.default_rng(2)
    sequences = np.concatenate([greedy_paths[:4], random_sequences[:4]])
    planted = [15, 16, 17, 24, 0, 15, 23, 24]
    documents = [rng.integers(3, 512, 40) for _ in range(3)]
    for i, (row, length) in enumerate(zip(sequences, planted, strict=True)):
        begin = PREFIX + (SUFFIX - length) * (i % 2)  # at the front or at the back of the suffix
        run = row[begin : begin + length]
        documents.append(np.concatenate([[2], run, [2]]))  # 2 is in no sequence, so nothing joins on
    # Matches of the prefix do not count, nor matches across two documents.
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


def test_all_thresholds_and_the_matched_documents_are_reported(tmp_path, tiny_model, options, random_sequences):
    planted = [7, 8, 15, 16, 20, 24]
    rows = zip(random_sequences[:6], planted, strict=True)
    documents = [np.concatenate([[2, 2], row[PREFIX : PREFIX + n]]) for row, n in rows]
    corpus = make_corpus(tmp_path / "corpus", tiny_model(), documents[::-1])
    result = extract(options(random_sequences[:6], corpus=corpus, min_overlap=20))
    assert (result["min_overlap"], result["matched_on"]) == (20, "tokens")
    counts = {t: [part[name]["n"] for name in CLASSES] for t, part in result["thresholds"].items()}
    assert counts == {"8": [1, 4, 1], "16": [3, 2, 1], "32": [5, 0, 1]}
    assert [result[name]["n"] for name in CLASSES] == [4, 1, 1]
    table = pq.read_table(tmp_path / "out" / "extraction.sequences.parquet").to_pydict()
    assert table["overlap"] == [0, 8, 15, 16, 20, 24]  # matches below all thresholds do not count
    assert table["document"] == [-1, 4, 3, 2, 1, 0]


def test_a_corpus_of_another_tokenizer_is_matched_on_its_text(tmp_path, tiny_model, options, model):
    """The same stories imported with another tokenizer share text, not tokens."""
    stories = list(tiny_texts(6, seed=5))
    texts = tmp_path / "stories.jsonl"
    texts.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories[:3]))
    other = tiny_model(vocab_size=400)
    import_text(ImportCorpusConfig(source=str(texts), model=str(other), out=str(tmp_path / "corpus")))
    encoded = [model.tokenizer.encode(story, add_special_tokens=False) for story in stories]
    sequences = np.array([tokens[8 : 8 + PREFIX + SUFFIX] for tokens in encoded])
    result = extract(options(sequences, corpus=str(tmp_path / "corpus")))
    assert result["matched_on"] == "text"
    table = pq.read_table(tmp_path / "out" / "extraction.sequences.parquet").to_pydict()
    assert table["class"][:3] == ["seen"] * 3
    assert table["document"][:3] == [0, 1, 2]
    assert "seen" not in table["class"][3:]


def test_controls_baseline_and_verification_are_in_the_result(
    tmp_path, tiny_model, options, greedy_paths, random_sequences
):
    other = str(tiny_model(seed=1))
    sequences = np.concatenate([greedy_paths[:6], random_sequences[:2]])
    np.save(tmp_path / "controls.npy", random_sequences[:10])
    comparisons = {"control_sequences": str(tmp_path / "controls.npy"), "untrained_baseline": other, "verify": True}
    result = extract(options(sequences, **comparisons))
    assert (result["exact_match"], result["controls"]["exact_match"], result["controls"]["n"]) == (0.75, 0.0, 10)
    assert (result["baseline"]["exact_match"], result["baseline"]["n"]) == (0.0, 8)
    assert result["baseline"]["logprob"] < result["logprob"]
    # Without a base the model verifies itself; no sequence is dropped.
    own = {"base": str(tiny_model()), "verified": 6, "kept": 6, "lost": 0, "gained": 0, "never": 2}
    assert result["verification"] == own
    assert set(result["controls"]["discoverable"]) == set(result["discoverable"])
    assert pq.read_table(tmp_path / "out" / "extraction.controls.parquet").num_rows == 10
    # The other model, verified by the first, loses everything.
    result = extract(options(sequences, model=other, verify=True, base=str(tiny_model())))
    assert result["verification"] == own | {"kept": 0, "lost": 6}
    table = pq.read_table(tmp_path / "out" / "extraction.sequences.parquet").to_pydict()
    assert table["verified"] == [True] * 6 + [False] * 2
    assert not any(table["exact_match"])


def test_results_are_grouped_by_number_of_duplicates(tmp_path, options, greedy_paths, random_sequences):
    sequences = np.concatenate([greedy_paths[:4], random_sequences[:4]])
    np.save(tmp_path / "copies.npy", np.array([1, 3, 4, 9, 0, 1, 2, 300]))
    result = extract(options(sequences, duplicate_counts=str(tmp_path / "copies.npy")))
    buckets = {name: (part["n"], part["exact_match"]) for name, part in result["duplicates"].items()}
    assert buckets == {
        "0": (1, 0.0), "1": (2, 0.5), "2": (1, 0.0), "3-4": (2, 1.0), "9-16": (1, 1.0), "257-512": (1, 0.0),
    }  # fmt: skip
    assert result["duplicates"]["1"]["sampling_policies"]["temperature=1,top-k=40"]["pz"] is not None


def test_a_start_token_is_not_doubled_in_silence(options, greedy_paths, caplog):
    with_bos = greedy_paths.copy()
    with_bos[:20, 0] = 1  # BOS
    with pytest.raises(InputError, match="--start-token bos: 20 of 32 prefixes begin with token 1 already"):
        load_extraction_sets(options(with_bos, start_token="bos"))
    with_bos[2:, 0] = 9
    load_extraction_sets(options(with_bos, start_token="bos"))
    assert "2 of 32 prefixes begin with token 1 already, and have it twice" in caplog.text


def test_a_start_token_and_an_offset_move_the_window(tmp_path, options, model, greedy_paths):
    """Extraction depends on BOS and on the position of the window."""
    padded = np.concatenate([np.full((32, 3), 9), greedy_paths], axis=1)
    assert extract(options(padded, offset=3))["exact_match"] == 1.0
    assert extract(options(padded))["exact_match"] < 0.2
    with_bos = extract(options(greedy_paths, start_token="bos"))
    started = np.concatenate([np.full((32, 1), 1), greedy_paths], axis=1)  # BOS is 1
    direct = extraction_metrics(model, started, PREFIX + 1, batch_tokens=BATCH)
    assert with_bos["logprob"] == pytest.approx(direct["logprob"].mean(), abs=1e-5)
    assert with_bos["exact_match"] == direct["exact_match"].mean() < 1.0
    assert (with_bos["prefix"], with_bos["start_token"]) == (PREFIX, "bos")


def test_protocols_set_prefix_and_suffix(options):
    array = np.zeros((1, 1))
    unset = {"prefix": None, "suffix": None}
    assert make_window(options(array, **unset)).length == 64
    assert make_window(options(array, **unset, protocol="lm-extraction")).prefix == 50
    assert make_window(options(array, prefix=50, suffix=None, protocol="lm-extraction")).length == 100
    with pytest.raises(InputError, match="--suffix 40 contradicts --protocol lm-extraction, whose suffix has 50"):
        make_window(options(array, prefix=None, suffix=40, protocol="lm-extraction"))


def test_a_model_flips_nothing_against_itself_across_batches_and_little_in_bfloat16(
    model, tiny_model, greedy_paths, random_sequences
):
    sequences = np.concatenate([greedy_paths, random_sequences])
    first = extraction_metrics(model, sequences, PREFIX, batch_tokens=BATCH, greedy_decode=False)
    for batch_tokens in (32, 200):
        again = extraction_metrics(model, sequences, PREFIX, batch_tokens=batch_tokens, greedy_decode=False)
        np.testing.assert_array_equal(first["exact_match"], again["exact_match"])
    rounded = extraction_metrics(
        hub.load_model(tiny_model(), "data=1", "bfloat16"), sequences, PREFIX, batch_tokens=BATCH, greedy_decode=False
    )
    flips = np.count_nonzero(first["exact_match"] != rounded["exact_match"])
    assert 0 < flips <= 32  # greedy paths of a random model are fragile; random sequences cannot flip
    assert not rounded["exact_match"][32:].any()


def test_extract_writes_what_it_returns_and_again_the_same_bytes(tmp_path, options, random_sequences):
    config = options(random_sequences)
    result = extract(config)
    folder = tmp_path / "out"
    assert json_files.read_json(folder / "extraction.json") == result
    names = [name for name in sorted(path.name for path in folder.iterdir()) if "timings" not in name]
    assert names == ["extraction.config.yaml", "extraction.json", "extraction.sequences.parquet"]
    before = [(folder / name).read_bytes() for name in names]
    extract(config)
    assert [(folder / name).read_bytes() for name in names] == before


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
        (np.zeros((2, 32), np.int32), {"suffix": 0}, "--suffix 0: must be at least 1"),
        (np.zeros((2, 32), np.int32), {"sequences": "nothing.npy"}, "no such file"),
        (np.zeros((2, 32), np.int32), {"corpus": "nowhere"}, "nowhere"),
    ],
)
def test_unusable_input_is_refused_and_nothing_written(tmp_path, options, array, changes, message):
    with pytest.raises(InputError, match=message):
        extract(options(array, **changes))
    assert not (tmp_path / "out").exists()


def test_on_the_real_model_classes_and_p_z_are_those_of_plain_python_and_transformers(tmp_path, stories260k, data_dir):
    """Half of the sequences are samples, so every class occurs."""
    sample(SampleConfig(model=str(stories260k), out=str(tmp_path / "corpus"), samples=96, max_tokens=128, seed=3,
                        stop_ids=(1,), mesh="data=1"))  # fmt: skip
    documents = [one.tokens.tolist() for one in open_corpus(tmp_path / "corpus").iter_samples()]
    texts = [
        json.loads(line)["text"] for line in (data_dir / "tinystories" / "heldout.jsonl").read_text().splitlines()[:60]
    ]
    tokenizer = hub.open_model(stories260k).tokenizer
    real = [row for text in texts if len(row := tokenizer.encode(text, add_special_tokens=False)[:48]) == 48]
    rng = np.random.default_rng(0)
    own = [row[begin : begin + 48] for row in documents if (begin := int(rng.integers(12))) + 48 <= len(row)]
    for row in own[::2]:  # half of these with a break in the suffix
        row[-int(rng.integers(2, 20))] = int(rng.integers(3, 512))
    rows = np.array([*real, *own], np.int32)
    np.save(tmp_path / "sequences.npy", rows)
    config = ExtractConfig(
        model=str(stories260k),
        sequences=str(tmp_path / "sequences.npy"),
        corpus=str(tmp_path / "corpus"),
        out=str(tmp_path / "extract.json"),
        prefix=16,
        suffix=32,
        mesh="data=1",
    )
    result = extract(config)
    table = pq.read_table(tmp_path / "extract.sequences.parquet").to_pydict()
    runs = longest_runs(rows[:, 16:].tolist(), documents)
    for threshold in (8, 16, 32):
        classes = [classify_overlap(run, 32, threshold) for run in runs]
        summary = result["thresholds"][str(threshold)]
        assert {name: summary[name]["n"] for name in CLASSES} == {name: classes.count(name) for name in CLASSES}
    assert table["class"] == [classify_overlap(run, 32, 16) for run in runs]
    assert min(result[name]["n"] for name in CLASSES) >= 10
    logprobs, exact = compute_log_pz(stories260k, rows, 16)
    np.testing.assert_allclose(table["logprob"], logprobs, atol=1e-3)
    np.testing.assert_array_equal(table["exact_match"], exact)


def test_ids_of_another_tokenizer_are_told(tmp_path, tiny_model, options, caplog):
    """Text keeps its ids when it is decoded and tokenized again; the same ids shifted by a few do not."""
    tokenizer = hub.open_model(tiny_model()).tokenizer
    encoded = [tokenizer.encode("<s>" + text, add_special_tokens=False) for text in tiny_texts(60)]
    rows = np.array([row[: PREFIX + SUFFIX] for row in encoded if len(row) >= PREFIX + SUFFIX], np.int32)
    assert len(rows) > 20
    extract(options(rows))
    assert "another tokenizer" not in caplog.text
    extract(options(3 + (rows + 90) % 500, out=str(tmp_path / "other.json")))
    assert "sequences keep their ids when they are decoded and tokenized again" in caplog.text
