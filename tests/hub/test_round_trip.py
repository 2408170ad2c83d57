"""Conversion to an Orbax tree and back is bitwise."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from model_params import assert_same_tensors, load_tensors
from models_factory import OF_EACH_TABLE, Family, WeightType, tiny_weights, write_tiny_hf_model
from parity_cases import transformers_logits
from safetensors.numpy import load_file, save_file

from jax_selftrain import hub
from jax_selftrain.config import ConvertConfig
from jax_selftrain.errors import InputError
from jax_selftrain.hub import safetensors_io
from jax_selftrain.hub.families import FAMILIES as TABLES
from jax_selftrain.io.json_files import read_json


def convert_twice(source: Path, tmp_path: Path) -> Path:
    hub.convert(ConvertConfig(source=str(source), out=str(tmp_path / "ours")))
    return hub.convert(ConvertConfig(source=str(tmp_path / "ours"), out=str(tmp_path / "back"), format="hf"))


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
@pytest.mark.parametrize("family", OF_EACH_TABLE)
def test_round_trip_is_bitwise(family: Family, dtype: WeightType, tmp_path: Path):
    source = write_tiny_hf_model(tmp_path / "hf", family, dtype=dtype, max_shard_bytes=100_000, tokenizer=False)
    assert len(list(source.glob("*.safetensors"))) > 2
    assert_same_tensors(load_tensors(convert_twice(source, tmp_path)), load_tensors(source))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_stay_narrow_on_disk(dtype: WeightType, tmp_path: Path):
    source = write_tiny_hf_model(tmp_path / "hf", "llama", dtype=dtype, torch_dtype=dtype)
    back = convert_twice(source, tmp_path)
    assert_same_tensors(load_tensors(back), load_tensors(source))
    arrays = read_json(tmp_path / "ours" / "params" / "manifest.json")["arrays"]
    assert {array["dtype"] for array in arrays.values()} == {dtype}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes(), name


def test_padded_vocabulary_rows_are_kept(tmp_path: Path):
    source = write_tiny_hf_model(tmp_path / "hf", "gpt_neox", vocab_size=512, tokenizer_size=400)
    back = load_tensors(convert_twice(source, tmp_path))
    assert back["gpt_neox.embed_in.weight"].shape[0] == back["embed_out.weight"].shape[0] == 512
    assert_same_tensors(back, load_tensors(source))
    assert hub.open_model(tmp_path / "back").special_tokens.tokenizer_length == 400


def test_legacy_buffers_are_dropped_and_listed(tmp_path: Path):
    source = write_tiny_hf_model(tmp_path / "hf", "gpt_neox", legacy_buffers=True, tokenizer=False)
    back = load_tensors(convert_twice(source, tmp_path))
    listed = read_json(tmp_path / "ours" / "selftrain.json")["dropped"]
    buffers = ("bias", "masked_bias", "rotary_emb.inv_freq")
    assert listed == sorted(f"gpt_neox.layers.{i}.attention.{buffer}" for i in range(2) for buffer in buffers)
    assert_same_tensors(back, {k: v for k, v in load_tensors(source).items() if k not in listed})


def test_the_copy_of_a_tied_embedding_is_dropped_and_listed(tmp_path: Path):
    source = write_tiny_hf_model(tmp_path / "hf", "llama", tie_word_embeddings=True, tokenizer=False)
    weights = load_tensors(source)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, source / "model.safetensors")
    assert_same_tensors(load_tensors(convert_twice(source, tmp_path)), weights)
    assert read_json(tmp_path / "ours" / "selftrain.json")["dropped"] == ["lm_head.weight"]


def test_a_tensor_keeps_the_name_it_came_with(tmp_path: Path):
    source = write_tiny_hf_model(tmp_path / "hf", "gpt_neox", tokenizer=False)
    weights = load_tensors(source)
    weights["lm_head.weight"] = weights.pop("embed_out.weight")  # as transformers 5 names it in new models
    save_file(weights, source / "model.safetensors")
    assert_same_tensors(load_tensors(convert_twice(source, tmp_path)), weights)


def test_large_weights_are_split_with_an_index(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    model = hub.load_model(tiny_model("qwen3"), "data=1")
    monkeypatch.setattr(safetensors_io, "MAX_SHARD_BYTES", 150_000)
    safetensors_io.save_weights(tmp_path, TABLES["qwen3"], model.config, model.params, model.export.tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in load_tensors(tmp_path).values())
    assert_same_tensors(load_tensors(tmp_path), load_tensors(tiny_model("qwen3")))


def test_conversion_casts_to_the_given_dtype(tmp_path: Path):
    source = write_tiny_hf_model(tmp_path / "hf", "llama", tokenizer=False, dtype="float32")
    out = hub.convert(ConvertConfig(source=str(source), out=str(tmp_path / "out"), format="hf", dtype="bfloat16"))
    expected = tiny_weights(read_json(source / "config.json"), dtype="bfloat16")
    assert_same_tensors(load_tensors(out), expected)


def test_conversion_refuses_a_dtype_in_which_a_weight_overflows(tmp_path: Path):
    source = write_tiny_hf_model(tmp_path / "hf", "llama", tokenizer=False, dtype="float32")
    tensors = load_tensors(source)
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, source / "model.safetensors")
    config = ConvertConfig(source=str(source), out=str(tmp_path / "out"), format="hf", dtype="float16")
    with pytest.raises(InputError, match=r"--dtype float16: final_norm/scale would be infinite"):
        hub.convert(config)
    assert not (tmp_path / "out").exists()


def test_a_model_with_other_weights_is_saved_under_the_same_names(tmp_path: Path):
    source = write_tiny_hf_model(tmp_path / "hf", "gpt_neox", dtype="float16")
    base = hub.load_model(source, "data=1")
    model = hub.LoadedModel(hub.open_model(source), base.params, base.sharding_rules, np.dtype(np.float32))
    saved = load_tensors(model.save_pretrained(tmp_path / "out"))
    assert saved.keys() == load_tensors(source).keys()
    assert {tensor.dtype.name for tensor in saved.values()} == {"float32"}
    assert model.special_tokens == base.special_tokens


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("family", OF_EACH_TABLE)
def test_transformers_opens_an_export_with_equal_logits(family: Family, tmp_path: Path):
    from transformers import AutoTokenizer

    source = write_tiny_hf_model(tmp_path / "hf", family)
    back = convert_twice(source, tmp_path)
    tokens = np.arange(64).reshape(2, 32)
    np.testing.assert_array_equal(transformers_logits(back, tokens), transformers_logits(source, tokens))
    text = "Once there was a fox."
    assert AutoTokenizer.from_pretrained(back).encode(text) == AutoTokenizer.from_pretrained(source).encode(text)
