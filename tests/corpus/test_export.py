"""Other libraries read an exported corpus completely and in order."""

import json
import re
import shutil
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from jax_selftrain.config import ExportConfig, ImportCorpusConfig
from jax_selftrain.corpus import export_corpus, import_text
from jax_selftrain.errors import InputError


@pytest.fixture
def corpus(tmp_path, make_corpus, documents):
    return make_corpus(tmp_path / "corpus", documents)


def test_tfds_opens_the_exported_folder_without_tensorflow(tmp_path, corpus):
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    out = export_corpus(ExportConfig(str(corpus.folder), str(tmp_path / "out"), "tfds"))
    source = tfds.builder_from_directory(out).as_data_source(split="train")
    assert len(source) == len(corpus)
    for sample, found in zip(corpus.iter_samples(), (source[i] for i in range(len(source))), strict=True):
        assert found["sample_id"] == sample.sample_id
        assert found["tokens"].tolist() == sample.tokens.tolist()
        assert found["tokens"].dtype == np.int32
        assert found["text"].decode() == sample.text
        assert found["finish_reason"].decode() == sample.finish_reason
        np.testing.assert_array_equal(found["logprob"], np.float32(sample.logprob))
    assert "tensorflow" not in sys.modules
    assert not list(out.glob("making*"))


def test_exporting_twice_in_one_process_gives_the_same_bytes(tmp_path, corpus, capsys):
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    pytest.importorskip("array_record")
    files = []
    for name in ("a", "b"):
        out = export_corpus(ExportConfig(str(corpus.folder), str(tmp_path / name), "tfds"))
        files.append({p.name: p.read_bytes() for p in out.iterdir() if p.name != "config.yaml"})
    assert files[0] == files[1]
    assert capsys.readouterr().out == ""


def test_damaged_tfds_folders_are_one_sentence(tmp_path, corpus, tiny_model):
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    whole = export_corpus(ExportConfig(str(corpus.folder), str(tmp_path / "whole"), "tfds"))

    def refused(split: str = "train") -> str:
        source, model = f"tfds:{tmp_path / 'cut'}", str(tiny_model("llama"))
        config = ImportCorpusConfig(source, model, str(tmp_path / "c"), split=split)
        with pytest.raises(InputError) as caught:
            import_text(config)
        shutil.rmtree(tmp_path / "cut")
        return str(caught.value)

    for name in ("features.json", "dataset_info.json"):
        path = shutil.copytree(whole, tmp_path / "cut") / name
        path.write_bytes(path.read_bytes()[:20])
        assert "tensorflow-datasets cannot open it" in refused()
    shutil.copytree(whole, tmp_path / "cut")
    assert "--split train[zz]" in refused("train[zz]")
    record = next(shutil.copytree(whole, tmp_path / "cut").glob("*array_record*"))
    record.write_bytes(record.read_bytes()[: record.stat().st_size // 2])
    assert re.search(r"cannot be read|is missing", refused())


def test_text_goes_out_by_tfds_and_comes_back(tmp_path, corpus, tiny_model):
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    pytest.importorskip("array_record")
    export_corpus(ExportConfig(str(corpus.folder), str(tmp_path / "out"), "tfds"))
    source = f"tfds:{tmp_path / 'out'}"
    config = ImportCorpusConfig(source, str(tiny_model("llama")), str(tmp_path / "back"))
    back = import_text(config)
    assert [s.text for s in back.iter_samples()] == [s.text for s in corpus.iter_samples()]
    first_three = import_text(replace(config, out=str(tmp_path / "three"), split="train[:3]"))
    assert [s.text for s in first_three.iter_samples()] == [s.text for s in corpus.iter_samples()][:3]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"split": "test"}, r"has no split 'test' \(it has: train\)"),
        ({"split": "train[:x]"}, "'train\\[:x\\]'"),
        ({"text_field": "body"}, "has no field 'body'"),
        ({"text_field": "tokens"}, "row 0: the text field holds ndarray"),
        ({"source": str(tmp_path / "out")}, f"is a TFDS folder; write {source}"),
    ]
    for changes, message in cases:
        with pytest.raises(InputError, match=message):
            import_text(replace(config, **{"out": str(tmp_path / "x"), **changes}))
    assert not (tmp_path / "x").exists()


def test_jsonl_holds_one_sample_a_line_and_comes_back(tmp_path, corpus, tiny_model):
    out = export_corpus(ExportConfig(str(corpus.folder), str(tmp_path / "out"), "jsonl"))
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    for line, sample in zip(lines, corpus.iter_samples(), strict=True):
        assert line == {
            "sample_id": sample.sample_id,
            "tokens": sample.tokens.tolist(),
            "text": sample.text,
            "logprob": None if np.isnan(sample.logprob) else sample.logprob,
            "finish_reason": sample.finish_reason,
        }
    assert json.loads((out / "export.json").read_text())["fingerprint"] == corpus.fingerprint
    model = str(tiny_model("llama"))
    back = import_text(ImportCorpusConfig(str(out / "samples.jsonl"), model, str(tmp_path / "back")))
    assert [s.text for s in back.iter_samples()] == [s.text for s in corpus.iter_samples()]


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path, corpus):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("")
    with pytest.raises(InputError, match="already exists"):
        export_corpus(ExportConfig(str(corpus.folder), str(tmp_path / "taken"), "jsonl"))
    with pytest.raises(InputError, match="no such corpus"):
        export_corpus(ExportConfig(str(tmp_path / "nowhere"), str(tmp_path / "out"), "jsonl"))
    unknown: dict[str, Any] = {"format": "csv"}
    with pytest.raises(InputError, match="--format: expected one of tfds, jsonl"):
        export_corpus(replace(ExportConfig(str(corpus.folder), str(tmp_path / "out")), **unknown))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "taken"]
