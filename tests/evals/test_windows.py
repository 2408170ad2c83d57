"""Windows over documents equal extraction of each window alone; summaries, files, resumption."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpus_factory import write_jsonl
from extraction_reference import compute_log_pz
from launcher import launch
from models_factory import tiny_texts

from jax_selftrain import hub
from jax_selftrain.config import ExtractWindowsConfig, yaml_io
from jax_selftrain.errors import InputError
from jax_selftrain.evals import extraction_metrics
from jax_selftrain.evals.windows import (
    COVERAGE_LEVELS,
    SlidingWindows,
    TokenizedText,
    make_layout,
    summarize_windows,
    window_index,
    window_metrics,
)
from jax_selftrain.io import json_files
from jax_selftrain.likelihood.resumable import PartialResults
from jax_selftrain.report import extract_windows
from jax_selftrain.sampling import SamplingParams, generate

POSITIONS, PREFIX, WINDOW = 96, 10, 12
BOS = 1


@pytest.fixture(scope="module")
def model(tiny_model):
    return hub.load_model(tiny_model(max_position_embeddings=POSITIONS), "data=1")


@pytest.fixture(scope="module")
def document(model):
    """300 random tokens; tokens 30 to 70 are the greedy continuation of those before."""
    tokens = np.random.default_rng(0).integers(3, 512, 300).astype(np.int32)
    greedy = SamplingParams(max_tokens=40, temperature=0)
    tokens[30:70] = generate(model, [tokens[:30].tolist()], greedy)[0]
    return tokens


def measure_alone(model, path: np.ndarray) -> dict[str, Any]:
    """Measure the last WINDOW tokens of a path from all its logits, in a batch of one."""
    padded = np.zeros((1, POSITIONS), np.int32)  # a causal model does not see the padding
    padded[0, : len(path)] = path
    logits = np.asarray(model.logits(padded), np.float64)[0, len(path) - WINDOW - 1 : len(path) - 1]
    logits -= logits.max(axis=1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    hits = logits.argmax(axis=1) == path[-WINDOW:]
    return {
        "logprob": logprobs[np.arange(WINDOW), path[-WINDOW:]].sum(),
        "exact_match": hits.all(),
        "matched_tokens": int(np.cumprod(hits).sum()),
        "teacher_forced_accuracy": hits.mean(),
    }


@pytest.mark.parametrize(
    ("stride", "max_prefix", "start"),
    [(1, POSITIONS - WINDOW, []), (7, 31, []), (3, PREFIX, []), (5, POSITIONS - WINDOW - 1, [BOS]), (29, 20, [])],
)
def test_every_window_of_a_document_equals_extraction_of_it_alone(model, document, stride, max_prefix, start):
    layout, text = SlidingWindows(WINDOW, stride, PREFIX, max_prefix), TokenizedText("text", (document,))
    found = window_metrics(model, [text], layout, start)
    block = max_prefix - PREFIX + 1
    begins = list(range(PREFIX, 300 - WINDOW + 1, stride))
    assert len(found["logprob"]) == len(begins)
    for i, begin in enumerate(begins):
        first = (begin - PREFIX) // block * block
        assert PREFIX <= begin - first <= max_prefix
        alone = measure_alone(model, np.concatenate([np.array(start, np.int32), document[first : begin + WINDOW]]))
        # sums over 12 tokens, each off by rounding of about 1e-6
        assert found["logprob"][i] == pytest.approx(alone.pop("logprob"), abs=1e-4)
        assert {name: found[name][i] for name in alone} == alone
    if stride == 1:
        assert found["exact_match"].tolist() == [30 <= begin <= 70 - WINDOW for begin in begins]
        assert begins[-1] + WINDOW == 300


def test_windows_with_prefixes_of_one_length_equal_extraction_metrics(model, document):
    layout = SlidingWindows(WINDOW, 4, PREFIX, PREFIX)
    texts = [TokenizedText("one", (document, document[:9])), TokenizedText("two", (document[5:50],))]
    found, index = window_metrics(model, texts, layout), window_index(texts, layout)
    documents = [texts[text].documents[doc] for text, doc in zip(index["text"], index["document"], strict=True)]
    pairs = zip(documents, index["begin"], strict=True)
    sequences = np.stack([tokens[begin - PREFIX : begin + WINDOW] for tokens, begin in pairs])
    expected = extraction_metrics(model, sequences, PREFIX, greedy_decode=False)
    # sums over 12 tokens, each off by rounding of about 1e-6
    np.testing.assert_allclose(found["logprob"], expected["logprob"], atol=1e-4)
    for name in ("exact_match", "matched_tokens", "teacher_forced_accuracy"):
        np.testing.assert_array_equal(found[name], expected[name])
    assert (index["prefix"] == PREFIX).all()


def test_windows_of_a_trained_model_equal_those_of_transformers(data_dir, stories260k):
    model = hub.load_model(stories260k, "data=1")
    story = json.loads((data_dir / "tinystories/heldout.jsonl").open().readline())["text"]
    tokens = np.array(model.tokenizer.encode(story, add_special_tokens=False), np.int32)
    found = window_metrics(model, [TokenizedText("story", (tokens,))], SlidingWindows(50, 10, 50, 50))
    sequences = np.stack([tokens[begin - 50 : begin + 50] for begin in range(50, len(tokens) - 49, 10)])
    logprob, exact = compute_log_pz(stories260k, sequences, 50)
    np.testing.assert_allclose(found["logprob"], logprob, atol=1e-3)
    assert found["exact_match"].tolist() == exact.tolist()


def test_coverage_and_most_probable_windows_equal_a_count_of_tokens(model):
    rng = np.random.default_rng(3)
    lengths = [[60, 21, 90], [45, 22]]
    texts = [
        TokenizedText(f"text {i}", tuple(rng.integers(3, 512, n).astype(np.int32) for n in row))
        for i, row in enumerate(lengths)
    ]
    layout = SlidingWindows(WINDOW, 5, PREFIX, 40)
    columns = window_index(texts, layout)
    n = len(columns["begin"])
    columns |= {"logprob": np.log(10.0 ** rng.uniform(-5, 0, n)), "exact_match": rng.random(n) < 0.5}
    columns |= {"matched_tokens": np.zeros(n, np.int32), "teacher_forced_accuracy": np.zeros(n)}
    summary = summarize_windows(columns, texts, layout, model.tokenizer)
    assert (summary["documents"], summary["num_skipped"], summary["tokens"]) == (4, 1, 60 + 90 + 45 + 22)
    rows = list(zip(*(columns[name].tolist() for name in ("text", "document", "begin", "logprob")), strict=True))
    for level in COVERAGE_LEVELS:
        covered = {(t, d, b + i) for t, d, b, logprob in rows if logprob >= np.log(level) for i in range(WINDOW)}
        assert summary["coverage"][f"{level:g}"] == len(covered) / summary["tokens"]
    assert 0 < summary["coverage"]["0.5"] < summary["coverage"]["0.001"] < 1
    best: list[tuple[int, int, int, float]] = []
    for row in sorted(rows, key=lambda row: -row[3]):
        if all(row[:2] != other[:2] or abs(row[2] - other[2]) >= WINDOW for other in best):
            best.append(row)
    listed = summary["most_probable"]
    assert [(int(one["text"][-1]), one["document"], one["begin"], one["logprob"]) for one in listed] == best[:10]
    _, doc, begin, _ = best[0]
    tokens = texts[best[0][0]].documents[doc][begin : begin + WINDOW]
    assert listed[0]["suffix"] == model.tokenizer.decode(tokens.tolist())
    second = summarize_windows(columns, texts, layout, model.tokenizer, 1)
    assert (second["documents"], second["num_skipped"], second["n"]) == (2, 0, int((columns["text"] == 1).sum()))
    assert {one["text"] for one in second["most_probable"]} == {"text 1"}


@pytest.fixture
def options(tmp_path, tiny_model):
    """`options(**changes)`: a book of one document, and short stories, one of them too short."""
    stories = list(tiny_texts(6, seed=5))
    book = write_jsonl(tmp_path / "book.jsonl", [{"text": " ".join(stories)}])
    rest = write_jsonl(tmp_path / "stories.jsonl", [{"text": text} for text in [*stories[:3], "short"]])

    def make(**changes: Any) -> ExtractWindowsConfig:
        given: dict[str, Any] = {
            "model": str(tiny_model(max_position_embeddings=POSITIONS)),
            "texts": (book, rest),
            "out": str(tmp_path / "out" / "found.json"),
            "window": WINDOW,
            "prefix": PREFIX,
            "mesh": "data=1",
        }
        return ExtractWindowsConfig(**(given | changes))

    return make


def test_extract_windows_writes_what_it_returns_and_again_the_same_bytes(tmp_path, options):
    result = extract_windows(options())
    folder = tmp_path / "out"
    assert json_files.read_json(folder / "found.json") == result
    names = sorted(path.name for path in folder.iterdir() if "timings" not in path.name)
    assert names == ["found.config.yaml", "found.json", "found.windows.parquet", "found.windows.svg"]
    assert (result["prefix"], result["max_prefix"], result["stride"]) == (PREFIX, POSITIONS - WINDOW, 10)
    table = pq.read_table(folder / "found.windows.parquet").to_pydict()
    for name, documents, skipped in (("book", 1, 0), ("stories", 3, 1)):
        part, rows = result["texts"][name], [i for i, text in enumerate(table["text"]) if text == name]
        assert (part["documents"], part["num_skipped"], part["n"]) == (documents, skipped, len(rows))
        assert part["logprob"] == pytest.approx(np.mean([table["logprob"][i] for i in rows]))
        assert part["pz"] == pytest.approx(np.mean(np.exp([table["logprob"][i] for i in rows])))
        best = part["most_probable"][0]
        assert best["logprob"] == max(table["logprob"][i] for i in rows)
    assert result["n"] == len(table["begin"])
    assert result["num_skipped"] == 1
    before = [(folder / name).read_bytes() for name in names]
    extract_windows(options())
    assert [(folder / name).read_bytes() for name in names] == before


def test_a_base_model_is_measured_on_the_same_windows(tmp_path, options, tiny_model):
    other = str(tiny_model(max_position_embeddings=POSITIONS, seed=1))
    both = extract_windows(options(base=other))
    table = pq.read_table(tmp_path / "out" / "found.windows.parquet").to_pydict()
    alone = extract_windows(options(model=other))
    single = pq.read_table(tmp_path / "out" / "found.windows.parquet").to_pydict()
    assert table["base logprob"] == single["logprob"]
    assert both["base"]["logprob"] == alone["logprob"]
    assert both["base"]["model"] == other
    change = np.array(table["logprob"]) - np.array(single["logprob"])
    assert both["change"]["logprob"] == pytest.approx(change.mean())
    assert both["change"]["logprob_stderr"] == pytest.approx(change.std(ddof=1) / np.sqrt(len(change)))
    assert both["texts"]["book"]["change"]["pz"] != both["texts"]["stories"]["change"]["pz"]
    unchanged = extract_windows(options(base=options().model))
    assert [unchanged["change"][name] for name in ("logprob", "pz", "exact_match")] == [0.0, 0.0, 0.0]


def test_the_default_prefix_reaches_the_positions_of_the_shorter_model(options, tiny_model):
    assert make_layout(options(start_token="bos")).max_prefix == POSITIONS - WINDOW - 1
    short = str(tiny_model(max_position_embeddings=64))
    assert make_layout(options(base=short)).max_prefix == 64 - WINDOW
    with pytest.raises(
        InputError, match=f"--max-prefix 60 and --window 12 are longer than the 64 positions of {short}"
    ):
        make_layout(options(base=short, max_prefix=60))


def test_only_missing_units_are_computed_again(tmp_path, model, document):
    layout = SlidingWindows(WINDOW, 3, PREFIX, PREFIX)
    text = TokenizedText("text", (document,))
    first, again = PartialResults(tmp_path / "parts"), PartialResults(tmp_path / "parts")
    whole = window_metrics(model, [text], layout, batch_tokens=16, parts=first)
    files = sorted((tmp_path / "parts").glob("*/*.parquet"))
    assert len(files) > 1
    lost = pq.read_metadata(files[0]).num_rows
    files[0].unlink()
    resumed = window_metrics(model, [text], layout, batch_tokens=16, parts=again)
    assert (first.computed_requests, again.computed_requests) == (first.unique_requests, lost)
    for name, values in whole.items():
        np.testing.assert_array_equal(resumed[name], values)


@pytest.mark.nightly
def test_a_killed_command_resumes_and_writes_the_same_bytes(tmp_path, options):
    whole = options(stride=1, max_prefix=PREFIX, batch_tokens=16)
    broken = replace(whole, out=str(tmp_path / "broken" / "found.json"))
    extract_windows(whole)
    yaml_io.save(tmp_path / "broken.yaml", broken)
    parts = Path(broken.out).with_suffix(".parts")
    process = launch("extract-windows", "--config", tmp_path / "broken.yaml")
    process.wait_until(lambda: any(parts.glob("*/*.parquet")))
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.communicate()[1]
    assert not Path(broken.out).exists()
    kept = sum(pq.read_metadata(file).num_rows for file in parts.glob("*/*.parquet"))
    extract_windows(broken)
    spent = json_files.read_json(Path(broken.out).with_suffix(".timings.json"))
    assert spent["computed_requests"] == spent["unique_requests"] - kept
    assert 0 < kept < spent["unique_requests"]
    for suffix in (".json", ".windows.parquet", ".windows.svg"):
        assert Path(broken.out).with_suffix(suffix).read_bytes() == Path(whole.out).with_suffix(suffix).read_bytes()
