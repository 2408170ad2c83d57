"""Token records equal what all logits give; near-verbatim measures equal plain Python."""

import json
import shutil
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpus_factory import write_jsonl
from extraction_reference import BATCH, PREFIX, SUFFIX, draw_greedy_paths, draw_random_sequences
from models_factory import tiny_texts
from records_factory import full_logit_scores

from jax_selftrain import hub
from jax_selftrain.config import ExtractConfig, ScoreConfig
from jax_selftrain.errors import InputError
from jax_selftrain.evals import extract, extraction_metrics, score
from jax_selftrain.evals.token_records import RECORDS, decode_pieces, load_records
from jax_selftrain.io.json_files import write_json
from jax_selftrain.likelihood import loglikelihoods
from jax_selftrain.likelihood.resumable import PartialResults
from jax_selftrain.likelihood.tokenize import rolling_windows
from jax_selftrain.sampling import SamplingParams, generate

POSITIONS = 64
SCORES = ("logprob", "mean_logprob", "std_logprob")


@pytest.fixture
def folder(tiny_model) -> Path:
    return tiny_model("llama", max_position_embeddings=POSITIONS)


@pytest.fixture
def options(tmp_path, folder):
    texts = [{"text": text * times} for times, text in zip((1, 3, 1), tiny_texts(3, seed=5), strict=True)]
    stories = write_jsonl(tmp_path / "stories.jsonl", texts)
    return partial(ScoreConfig, model=str(folder), texts=(stories,), mesh="data=1", batch_tokens=512)


def check_row(row: dict[str, Any], logits: np.ndarray) -> None:
    expected = full_logit_scores(logits, row["tokens"])
    assert row["greedy"] == expected.pop("greedy").tolist()
    for name, values in expected.items():
        np.testing.assert_allclose(row[name], values, atol=2e-5, err_msg=name)  # fp32 logits are right to 1e-6


def test_records_of_texts_join_windows_and_equal_those_of_all_logits(tmp_path, folder, options):
    result = score(options(out=str(tmp_path / "with.json"), token_records=True))
    records = load_records(str(tmp_path / "with.tokens.parquet"))
    assert records.table.schema.equals(RECORDS)
    assert records.fingerprints == {name: result["fingerprints"][name] for name in ("model", "tokenizer")}
    model = hub.load_model(folder, "data=1")
    rows = records.table.to_pylist()
    assert [(row["set"], row["document"]) for row in rows] == [("stories", i) for i in range(3)]
    assert max(len(row["tokens"]) for row in rows) > 2 * POSITIONS
    for row in rows:
        assert row["tokens"] == model.tokenizer.encode(row["text"], add_special_tokens=False)
        assert "".join(row["pieces"]) == row["text"]
        windows = list(rolling_windows(row["tokens"], 1, POSITIONS))  # BOS is 1
        inputs = np.zeros((8, POSITIONS), np.int32)  # one shape: later tokens are masked
        for whole, (context, continuation) in zip(inputs, windows, strict=False):
            whole[: len(context) + len(continuation) - 1] = [*context, *continuation[:-1]]
        logits = zip(np.asarray(model.logits(inputs)), windows, strict=False)
        check_row(row, np.concatenate([one[len(w.context) - 1 :][: len(w.continuation)] for one, w in logits]))
    requests = pq.read_table(tmp_path / "with.requests.parquet").to_pylist()
    sums = np.bincount([row["doc"] for row in requests], [row["loglikelihood"] for row in requests])
    np.testing.assert_allclose([np.sum(row["logprob"]) for row in rows], sums, rtol=1e-12)


def test_without_the_option_there_are_no_records_and_the_result_is_the_same(tmp_path, options):
    results = [score(options(out=str(tmp_path / f"{flag}.json"), token_records=flag)) for flag in (True, False)]
    assert not (tmp_path / "False.tokens.parquet").exists()
    for task, numbers in results[0]["texts"].items():
        assert numbers == pytest.approx(results[1]["texts"][task], rel=1e-6)  # another program may round differently


def test_records_without_texts_are_refused(tmp_path, options):
    task = write_jsonl(tmp_path / "task.jsonl", [{"context": "a", "choices": [" b", " c"], "answer": 0}])
    with pytest.raises(InputError, match="--token-records records the tokens of --texts"):
        score(options(out=str(tmp_path / "no.json"), texts=(), tasks=(task,), token_records=True))
    assert not list(tmp_path.glob("no.*"))


def test_units_of_an_interrupted_scoring_keep_their_token_scores(tmp_path, folder):
    model, rng = hub.load_model(folder, "data=1"), np.random.default_rng(0)
    requests = [(row[:3], row[3:]) for row in rng.integers(3, 512, (80, 12)).tolist()]
    run = partial(loglikelihoods, model, requests, batch_tokens=64, token_scores=True)
    expected = run()
    run(parts=PartialResults(tmp_path / "parts"))
    files = sorted((tmp_path / "parts").glob("*/*.parquet"))
    assert len(files) > 2
    missing = pq.read_metadata(files[1]).num_rows
    files[1].unlink()
    parts = PartialResults(tmp_path / "parts")
    for found, known in zip(run(parts=parts), expected, strict=True):
        assert found[:3] == known[:3]
        for a, b in zip(found.token_scores, known.token_scores, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    assert parts.computed_requests == missing
    assert all(one.token_scores is None for one in loglikelihoods(model, requests[:2], batch_tokens=64, parts=parts))


def test_records_of_sequences_and_controls_equal_those_of_all_logits(tmp_path, tiny_model):
    sequences, controls = draw_random_sequences()[:6], draw_random_sequences()[6:9]
    files = {"sequences": sequences, "control_sequences": controls}
    for name, rows in files.items():
        np.save(tmp_path / f"{name}.npy", rows)
    config = partial(
        ExtractConfig,
        model=str(tiny_model()),
        **{name: str(tmp_path / f"{name}.npy") for name in files},
        prefix=PREFIX,
        suffix=SUFFIX,
        mesh="data=1",
        batch_tokens=BATCH,
        greedy_decode=False,
        start_token="bos",
    )
    results = [extract(config(out=str(tmp_path / f"{flag}.json"), token_records=flag)) for flag in (True, False)]
    assert len(results[0]["fingerprints"].pop("tokens")) == 64  # the only entry that records add
    assert results[0] == results[1]
    shutil.copy(tmp_path / "True.tokens.parquet", tmp_path / "moved.tokens.parquet")
    write_json(tmp_path / "moved.json", {"fingerprints": {"tokens": "0" * 64}})
    with pytest.raises(InputError, match=r"moved\.tokens\.parquet: does not match moved\.json"):
        load_records(str(tmp_path / "moved.tokens.parquet"))
    tables = [pq.read_table(tmp_path / f"{flag}.sequences.parquet") for flag in (True, False)]
    assert tables[0].equals(tables[1])
    assert not (tmp_path / "False.tokens.parquet").exists()
    rows = load_records(str(tmp_path / "True.tokens.parquet")).table.to_pylist()
    assert [row["set"] for row in rows] == ["sequences"] * 6 + ["controls"] * 3
    model = hub.load_model(tiny_model(), "data=1")
    whole = np.concatenate([np.ones((9, 1), np.int32), np.concatenate([sequences, controls])], axis=1)  # BOS is 1
    logits = np.asarray(model.logits(whole))[:, PREFIX:-1]
    for row, tokens, each in zip(rows, whole[:, PREFIX + 1 :], logits, strict=True):
        assert row["tokens"] == tokens.tolist()
        assert row["text"] == model.tokenizer.decode(tokens)
        check_row(row, each)


def levenshtein(a: list[int], b: list[int]) -> int:
    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        change = distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(change, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    return distance(len(a), len(b))


def longest_common(a: list[int], b: list[int]) -> int:
    @cache
    def length(i: int, j: int) -> int:
        if not i or not j:
            return 0
        return max(length(i - 1, j), length(i, j - 1), length(i - 1, j - 1) + (a[i - 1] == b[j - 1]))

    return length(len(a), len(b))


def test_near_verbatim_measures_equal_plain_python(tiny_model):
    model = hub.load_model(tiny_model(), "data=1")
    sequences = np.concatenate([draw_greedy_paths(model)[:20], draw_random_sequences()[:4]])
    rng = np.random.default_rng(3)
    for row in sequences[4:16]:  # an insertion shifts the rest of the suffix; a change does not
        at = PREFIX + int(rng.integers(SUFFIX))
        row[at:] = [int(rng.integers(3, 512)), *row[at:-1]]
    for i, known in ((16, 1), (17, 5), (18, 20)):  # the greedy path from the prefix and `known` other tokens
        start = [*sequences[i, :PREFIX].tolist(), *rng.integers(3, 512, known).tolist()]
        rest = SamplingParams(max_tokens=SUFFIX - known, temperature=0)
        sequences[i] = [*start, *generate(model, [start], rest)[0]]
    sequences[19, -1] = 2  # in no greedy path
    measured = extraction_metrics(model, sequences, PREFIX, batch_tokens=BATCH)
    logits = np.asarray(model.logits(sequences))[:, PREFIX - 1 : -1]
    suffixes = sequences[:, PREFIX:].tolist()
    greedy = SamplingParams(max_tokens=SUFFIX, temperature=0)
    decoded = generate(model, sequences[:, :PREFIX].tolist(), greedy)
    for i, (suffix, path) in enumerate(zip(suffixes, decoded, strict=True)):
        path = list(map(int, path))
        distance = levenshtein(path, suffix) / SUFFIX
        assert measured["edit_distance"][i] == pytest.approx(distance, abs=1e-12)
        assert measured["approximate_match"][i] == (distance <= 0.1)
        common = longest_common(path, suffix) / SUFFIX
        assert measured["longest_common_subsequence"][i] == pytest.approx(common, abs=1e-12)
        best = logits[i].argmax(-1).tolist()
        known = next((k for k in range(SUFFIX) if best[k:] == suffix[k:]), SUFFIX)
        assert measured["extraction_strength"][i] == pytest.approx(1 - known / SUFFIX, abs=1e-12)
    assert measured["extraction_strength"][:4].tolist() == [1.0] * 4
    np.testing.assert_allclose(measured["extraction_strength"][16:20], 1 - np.array([1, 5, 20, SUFFIX]) / SUFFIX)
    assert 0 < measured["approximate_match"][4:].mean() < 1


def test_pieces_of_real_tokenizers_join_to_the_text(data_dir, stories260k):
    for folder, lead in ((data_dir / "pythia-tokenizer", ""), (stories260k, " ")):
        tokenizer = hub.open_model(folder).tokenizer
        lines = (data_dir / "tinystories" / "heldout.jsonl").read_text().splitlines()[:50]
        for text in (json.loads(line)["text"] for line in lines):
            if text.isascii():
                tokens = np.array(tokenizer.encode(text, add_special_tokens=False))
                assert "".join(decode_pieces(tokenizer, tokens)) == lead + text
