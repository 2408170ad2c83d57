"""Tokenizers that are damaged, hostile or of another library are read rightly, or refused in one sentence."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models_factory import tiny_texts, write_tiny_hf_model

from jax_selftrain import cli, hub
from jax_selftrain.config import ConvertConfig
from jax_selftrain.errors import InputError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_hf_model(tmp_path / "model", "llama")


def change(folder: Path, **parts: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))


def replace(content: str, pattern: str = "a") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": None}}, "cannot be opened"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAAAAAAAAAA"}}, "cannot be opened"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "cannot be opened .PanicException"),
        ({"normalizer": {"type": "Sequence", "normalizers": [replace("a" * 100)] * 4}}, "100,000,000 times as long"),
        ({"model": {"type": "BPE"}}, "cannot be opened"),
        ({"normalizer": {"type": "Sequence"}}, "cannot be opened"),
    ],
)  # fmt: skip
def test_a_broken_pipeline_is_refused_by_name(model: Path, parts: dict[str, Any], message: str) -> None:
    change(model, **parts)
    with pytest.raises(InputError, match=f"model.*{message}"):
        _ = hub.open_model(model).tokenizer


def test_a_normalizer_that_lengthens_texts_a_little_is_accepted(model: Path) -> None:
    change(model, normalizer={"type": "Sequence", "normalizers": [replace("▁▁", " "), replace("b" * 8)]})
    assert hub.open_model(model).tokenizer.encode("a", add_special_tokens=False)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "[]", "3", '{"n": ' + "9" * 5_000 + "}"])
def test_json_that_is_too_deep_or_no_object_is_refused_by_name(model: Path, name: str, content: str) -> None:
    (model / name).write_text(content)
    with pytest.raises(InputError, match=f"{name}: (not valid JSON|is not a JSON object)"):
        _ = hub.open_model(model).tokenizer


def test_a_text_that_the_tokenizer_cannot_read_is_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """This regular expression backtracks without end on most texts."""
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    change(model, pre_tokenizer=pattern)
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "a" * 40 + "b"}) + "\n")
    words = ["import", str(tmp_path / "t.jsonl"), "--model", str(model), "--out", str(tmp_path / "out")]
    assert cli.main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("jax-selftrain import: error: the tokenizer cannot read a text (PanicException")


@pytest.mark.parametrize(
    "words",
    [
        ["import", "{texts}", "--out", "{out}"],
        ["score", "--texts", "{texts}", "--out", "{out}.json"],
        ["extract", "--sequences", "{texts}", "--out", "{out}.json"],
    ],
)
def test_a_text_that_would_fill_the_memory_is_refused_with_its_line(
    model: Path, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "long.jsonl"
    texts.write_text('{"text": "short"}\n{"text": "' + "a" * 17_000_000 + '"}\n')
    words = [word.format(texts=texts, out=tmp_path / "out") for word in words]
    assert cli.main([*words, "--model", str(model)]) == 2
    assert "long.jsonl:2: the text has 17,000,000 characters, more than 16,777,216; split it" in capsys.readouterr().err


def test_a_link_out_of_a_model_folder_is_not_copied(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (model / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"chat_template\.jinja: is a link to .*secret, outside the folder"):
        hub.convert(ConvertConfig(source=str(model), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_links_of_the_cache_of_the_hub_are_copied(model: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "cache" / "snapshots" / ("0" * 40), tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    converted = hub.convert(ConvertConfig(source=str(snapshot), out=str(tmp_path / "out")))
    assert (converted / "tokenizer.json").read_bytes() == (snapshot / "tokenizer.json").read_bytes()


def test_a_tokenizer_of_sentencepiece_gives_its_ids(tmp_path: Path) -> None:
    """As OpenLLaMA and early Llama conversions have it: tokenizer.model alone."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs jax-selftrain[sentencepiece]")
    model = write_tiny_hf_model(tmp_path / "model", "llama", tokenizer=False)
    written = io.BytesIO()
    trained: Callable[..., None] = sentencepiece.SentencePieceTrainer.train
    trained(sentence_iterator=tiny_texts(400), model_writer=written, vocab_size=400, model_type="bpe",
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            minloglevel=2)  # fmt: skip
    (model / "tokenizer.model").write_bytes(written.getvalue())
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    source = hub.open_model(model)
    reference = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    texts = [*tiny_texts(100), "two  spaces é 漢 \n\n", "1 + 1 = 2!"]
    assert [source.tokenizer.encode(text, add_special_tokens=False) for text in texts] == reference.encode(texts)
    assert (source.special_tokens.bos_token_id, source.special_tokens.eos_token_ids) == (1, (2,))
    assert source.special_tokens.tokenizer_length == 400
