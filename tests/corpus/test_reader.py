"""A corpus opens complete and undamaged, or is refused with a remedy."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from bad_input import flip_byte

from jax_selftrain.corpus import open_corpus
from jax_selftrain.corpus.schema import FINISH_REASONS
from jax_selftrain.errors import InputError
from jax_selftrain.io import json_files


@pytest.fixture
def corpus(tmp_path, make_corpus, documents):
    return make_corpus(tmp_path / "corpus", documents)


def test_token_arrays_are_the_documents_end_to_end(corpus, documents):
    flat, offsets, reasons = corpus.token_arrays()
    assert (flat.dtype, offsets.dtype) == (np.int32, np.int64)
    assert [flat[a:b].tolist() for a, b in pairwise(offsets)] == documents
    assert [FINISH_REASONS[code] for code in reasons] == [s.finish_reason for s in corpus.iter_samples()]
    assert len(corpus) == len(documents)
    assert corpus.n_tokens == len(flat)


def test_documents_without_tokens_are_read_back(tmp_path, make_corpus):
    corpus = make_corpus(tmp_path / "c", [[], [3], [], []], per_shard=2)
    assert corpus.token_arrays()[1].tolist() == [0, 0, 1, 1, 1]
    assert [s.tokens.tolist() for s in corpus.iter_samples()] == [[], [3], [], []]


def test_more_rows_than_a_read_batch_keep_their_order(tmp_path, make_corpus):
    documents = [[i, i + 1][: 1 + i % 2] for i in range(2600)]
    corpus = make_corpus(tmp_path / "c", documents, per_shard=2500)
    flat, offsets, _ = corpus.token_arrays()
    assert flat.tolist() == [token for document in documents for token in document]
    assert [s.tokens.tolist() for s in corpus.iter_samples()] == documents
    assert offsets[-1] == len(flat)


def test_a_flipped_byte_is_refused_naming_shard_and_remedy(corpus):
    path = corpus.folder / "shard-000001.parquet"
    flip_byte(path)
    expected = corpus.manifest["shards"][1]["sha256"]
    with pytest.raises(InputError) as caught:
        open_corpus(corpus.folder)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert f"expected {expected[:8]}…, found " in message
    assert message.endswith("delete the shard and run the same command to regenerate it")


def test_a_truncated_shard_is_refused(corpus):
    path = corpus.folder / "shard-000000.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"shard-000000.parquet: the file is truncated"):
        open_corpus(corpus.folder)


def test_a_deleted_shard_is_counted_and_named(corpus):
    (corpus.folder / "shard-000002.parquet").unlink()
    with pytest.raises(InputError, match=r"1 of 3 shards is missing \(shard-000002.parquet\)"):
        open_corpus(corpus.folder)


def test_an_unfinished_corpus_says_how_much_is_missing(corpus):
    (corpus.folder / "corpus.json").unlink()
    begun = {key: corpus.manifest[key] for key in ("samples", "samples_per_shard")}
    json_files.write_json(corpus.folder / "request.json", begun)
    with pytest.raises(InputError, match=r"incomplete corpus, corpus.json is missing"):
        open_corpus(corpus.folder)
    (corpus.folder / "shard-000001.parquet").unlink()
    with pytest.raises(InputError, match=r"incomplete corpus, 1 of 3 shards is missing \(shard-000001.parquet\)"):
        open_corpus(corpus.folder)


def test_a_corpus_only_begun_is_incomplete(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "request.json").write_text('{"samples": 9, "samples_per_shard": 2}')
    with pytest.raises(InputError, match="5 of 5 shards are missing"):
        open_corpus(tmp_path / "c")


def test_shards_without_any_manifest_are_no_corpus(corpus):
    for name in ("corpus.json", "request.json"):
        (corpus.folder / name).unlink()
    with pytest.raises(InputError, match="not a corpus folder"):
        open_corpus(corpus.folder)


def test_the_wrong_tokenizer_is_refused(corpus):
    assert open_corpus(corpus.folder, tokenizer_fingerprint="a" * 64).fingerprint == corpus.fingerprint
    with pytest.raises(InputError, match=r"another tokenizer \(corpus aaaaaaaa…, model bbbbbbbb…\)"):
        open_corpus(corpus.folder, tokenizer_fingerprint="b" * 64)


def test_a_missing_or_foreign_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such corpus folder"):
        open_corpus(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not a corpus folder"):
        open_corpus(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is not of the format 'jax-selftrain corpus'"),
        ({"version": 99}, "has format version 99, not 2"),
        ({"samples": 0, "shards": [], "tokens": 0}, "the corpus is empty"),
        ({"samples": 11}, "do not add up"),
        ({"shards": [{"file": "x"}]}, "list of shards is damaged"),
        ({"shards": None}, "'shards' is missing or damaged"),
        ({"start_id": "one"}, "'start_id' is missing or damaged"),
    ],
)
def test_a_damaged_manifest_is_refused(corpus, change, message):
    path = corpus.folder / "corpus.json"
    json_files.write_json(path, {**json_files.read_json(path), **change})
    with pytest.raises(InputError, match=message):
        open_corpus(corpus.folder)


def test_a_manifest_without_a_key_or_without_json_is_refused(corpus):
    path = corpus.folder / "corpus.json"
    manifest = json_files.read_json(path)
    json_files.write_json(path, {key: value for key, value in manifest.items() if key != "start_id"})
    with pytest.raises(InputError, match="'start_id' is missing"):
        open_corpus(corpus.folder)
    path.write_text(json.dumps(manifest)[:-20])
    with pytest.raises(InputError, match="not valid JSON"):
        open_corpus(corpus.folder)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path, corpus):
    outside = tmp_path / "outside.parquet"
    outside.write_bytes(Path(corpus.folder, "shard-000000.parquet").read_bytes())
    path = corpus.folder / "corpus.json"
    manifest = json_files.read_json(path)
    manifest["shards"][0]["file"] = "../outside.parquet"
    json_files.write_json(path, manifest)
    with pytest.raises(InputError, match="outside the folder"):
        open_corpus(corpus.folder)


def test_the_datasets_library_opens_the_shards(corpus, documents, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = str(corpus.folder / "shard-*.parquet")
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert dataset["tokens"][:] == documents
    assert dataset.features["tokens"] == datasets.List(datasets.Value("int32"))
    assert dataset[0]["logprob"] is None
    assert dataset.column_names == ["sample_id", "tokens", "text", "logprob", "finish_reason"]


def test_the_datasets_library_opens_the_folder(corpus, documents, tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.load_dataset(str(corpus.folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert dataset["tokens"][:] == documents
