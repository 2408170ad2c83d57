"""Damaged or unsupported weights are refused by name; nothing half-written remains."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from model_params import hash_params
from models_factory import write_safetensors, write_tiny_hf_model
from safetensors.numpy import load_file

from jax_selftrain import hub
from jax_selftrain.config import ConvertConfig
from jax_selftrain.errors import InputError
from jax_selftrain.hub.model_folder import MODEL_CARD


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_hf_model(tmp_path / "model", "llama", tokenizer=False)


def assert_refused(folder: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        hub.load_model(folder, "data=1")
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(folder), *words):
        assert word in message, message


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    write_safetensors(folder, weights)


def test_truncated_safetensors(folder: Path):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for size in (len(content) - 1, len(content) // 2, 100, 7, 0):
        path.write_bytes(content[:size])
        assert_refused(folder, "model.safetensors", "not a whole safetensors file")


def test_a_file_that_is_no_safetensors(folder: Path):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1 oid sha256:0 size 1")
    assert_refused(folder, "model.safetensors", "not a whole safetensors file")


def test_pickle_is_refused_with_the_way_out(folder: Path):
    (folder / "model.safetensors").rename(folder / "model.pt")
    assert_refused(folder, "model.pt", "is not read", "save_pretrained", "pytorch_model.bin")


def test_no_weights_at_all(folder: Path):
    (folder / "model.safetensors").unlink()
    assert_refused(folder, "holds no weights")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_nan_and_infinity_are_named(folder: Path, value: float, dtype):
    name = "model.layers.1.mlp.up_proj.weight"

    def poison(weights: dict[str, np.ndarray]) -> None:
        weights[name] = weights[name].astype(dtype)
        weights[name][5, 7] = value

    rewrite(folder, poison)
    assert_refused(folder, name, "NaN or infinity")


def test_nan_in_a_written_folder_is_named(folder: Path, tmp_path: Path):
    model = hub.load_model(folder, "data=1")
    broken = np.array(model.params["final_norm"]["scale"])
    broken[3] = np.nan
    params = {**model.params, "final_norm": {"scale": broken}}
    for format_, name in (("flax", "final_norm/scale"), ("hf", "model.norm.weight")):
        out = hub.save_model(tmp_path / format_, params, source=folder, metadata={}, format=format_)
        assert_refused(out, name, "NaN")


def test_unknown_missing_and_misshapen_tensors(folder: Path):
    rewrite(folder, lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}))
    assert_refused(folder, "model.layers.0.self_attn.q_proj.bias", "not known")
    rewrite(folder, lambda w: [w.pop("model.layers.0.self_attn.q_proj.bias"), w.pop("model.norm.weight")])
    assert_refused(folder, "model.norm.weight", "missing")
    rewrite(folder, lambda w: w.update({"model.norm.weight": np.ones(63, np.float32)}))
    assert_refused(folder, "model.norm.weight", "(63,)", "(64,)")


@pytest.mark.parametrize(("dtype", "code"), [(np.int8, "I8"), (ml_dtypes.float8_e4m3fn, "F8_E4M3")])
def test_other_types_are_refused(folder: Path, dtype, code: str):
    rewrite(folder, lambda w: w.update({"model.norm.weight": w["model.norm.weight"].astype(dtype)}))
    assert_refused(folder, "model.norm.weight", code)


def test_double_precision_is_read_as_single(folder: Path):
    name, expected = "model.norm.weight", load_file(folder / "model.safetensors")["model.norm.weight"]
    rewrite(folder, lambda w: w.update({name: w[name].astype(np.float64)}))
    model = hub.load_model(folder, "data=1")
    np.testing.assert_array_equal(model.params["final_norm"]["scale"], expected)
    assert model.export is not None
    assert model.export.tensors[name] == "float32"
    rewrite(folder, lambda w: w.update({name: w[name].astype(np.float64) * 1e300}))
    assert_refused(folder, name, "NaN or infinity")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_dropped(folder: Path, tmp_path: Path, prefix: str):
    expected = hub.load_model(folder, "data=1").params
    weights = {f"{prefix}{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    write_safetensors(folder, weights)
    model = hub.load_model(folder, "data=1")
    assert hash_params(model.params) == hash_params(expected)
    written = load_file(model.save_pretrained(tmp_path / "out") / "model.safetensors")
    assert {f"{prefix}{name}" for name in written} == weights.keys()


@pytest.mark.parametrize(
    ("family", "embedding", "head"),
    [
        ("llama", "model.embed_tokens.weight", "lm_head.weight"),
        ("gpt_neox", "gpt_neox.embed_in.weight", "embed_out.weight"),
        ("gpt2", "transformer.wte.weight", "lm_head.weight"),
    ],
)
def test_a_tied_model_may_hold_the_head_alone(tmp_path: Path, family: Any, embedding: str, head: str):
    """`safetensors.torch.save_model` keeps one of two names of a shared tensor."""
    folder = write_tiny_hf_model(tmp_path / "tied", family, tie_word_embeddings=True, tokenizer=False)
    expected = hub.load_model(folder, "data=1").params
    rewrite(folder, lambda w: w.update({head: w.pop(embedding)}))
    model = hub.load_model(folder, "data=1")
    assert hash_params(model.params) == hash_params(expected)
    assert embedding in load_file(model.save_pretrained(tmp_path / "out") / "model.safetensors")


def test_an_adapter_is_not_ignored(folder: Path):
    (folder / "adapter_config.json").write_text("{}")
    assert_refused(folder, "adapter_config.json", "merge_and_unload")
    (folder / "config.json").unlink()
    assert_refused(folder, "adapter_config.json", "merge_and_unload")


def test_tied_embeddings_that_differ(tmp_path: Path):
    folder = write_tiny_hf_model(tmp_path / "tied", "gpt_neox", tie_word_embeddings=True, tokenizer=False)
    rewrite(folder, lambda w: w.update({"embed_out.weight": w["gpt_neox.embed_in.weight"] + 1}))
    assert_refused(folder, "embed_out.weight", "tie_word_embeddings")


def test_legacy_buffers_are_no_excuse_for_other_names(tmp_path: Path):
    folder = write_tiny_hf_model(tmp_path / "m", "gpt_neox", legacy_buffers=True, tokenizer=False)
    hub.load_model(folder, "data=1")
    rewrite(folder, lambda w: w.update({"gpt_neox.layers.0.attention.rope.bias": np.zeros(2, np.float32)}))
    assert_refused(folder, "gpt_neox.layers.0.attention.rope.bias", "not known")


def test_damaged_indexes(tmp_path: Path):
    folder = write_tiny_hf_model(tmp_path / "m", "llama", tokenizer=False, max_shard_bytes=100_000)
    index = folder / "model.safetensors.index.json"
    content = index.read_text()
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[0].rename(folder / "kept")
    assert_refused(folder, shards[0].name, "not there")
    (folder / "kept").rename(shards[0])
    shards[1].write_bytes(shards[0].read_bytes())
    assert_refused(folder, "is in both", shards[0].name, shards[1].name)
    index.write_text("{")
    assert_refused(folder, index.name, "not valid JSON")
    index.write_text('{"weight_map": {}}')
    assert_refused(folder, index.name, "weight_map")
    escaping = json.loads(content)
    escaping["weight_map"] = dict.fromkeys(escaping["weight_map"], "../../etc/passwd")
    index.write_text(json.dumps(escaping))
    assert_refused(folder, "passwd", "no file of its folder")


@pytest.mark.parametrize("format_", ["flax", "hf"])
def test_damage_in_a_written_folder_is_named(format_: str, folder: Path, tmp_path: Path):
    ours = hub.convert(ConvertConfig(source=str(folder), out=str(tmp_path / "ours"), format=format_))
    for path in sorted(p for p in ours.rglob("*") if p.is_file() and p.stat().st_size and p.name != MODEL_CARD):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert_refused(ours, path.name)
        path.write_bytes(content)
    path = ours / "config.json"
    path.write_text(path.read_text().replace("10000.0", "20000.0"))
    assert_refused(ours, "config.json", "checksum differs")


def test_a_failed_conversion_leaves_nothing(folder: Path, tmp_path: Path):
    rewrite(folder, lambda w: w["lm_head.weight"].fill(np.nan))
    for format_ in ("flax", "hf"):
        with pytest.raises(InputError, match=r"lm_head\.weight"):
            hub.convert(ConvertConfig(source=str(folder), out=str(tmp_path / "out"), format=format_))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_nothing_is_overwritten(folder: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    for format_ in ("flax", "hf"):
        with pytest.raises(InputError, match="already exists"):
            hub.convert(ConvertConfig(source=str(folder), out=str(tmp_path / "out"), format=format_))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_code_in_a_model_folder_is_never_run(tmp_path: Path):
    folder = write_tiny_hf_model(tmp_path / "m", "llama")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert_refused(folder, "auto_map", "never run")
    assert not (tmp_path / "ran").exists()


def test_a_damaged_tokenizer_is_refused(tmp_path: Path):
    folder = write_tiny_hf_model(tmp_path / "m", "llama")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    assert_refused(folder, "tokenizer cannot be opened")


def test_an_unknown_key_is_dropped_by_convert_alone_and_on_request(folder: Path, tmp_path: Path):
    expected = hub.load_model(folder, "data=1").logits(np.arange(8)[None])
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"harmless": 1}))
    assert_refused(folder, "harmless", "--ignore-config-keys")
    for format in ("hf", "flax"):
        config = ConvertConfig(source=str(folder), out=str(tmp_path / format), format=format)
        with pytest.raises(InputError, match="harmless"):
            hub.convert(config)
        out = hub.convert(replace(config, ignore_config_keys=("harmless",)))
        np.testing.assert_array_equal(hub.load_model(out, "data=1").logits(np.arange(8)[None]), expected)
        assert json.loads((out / "config.json").read_text()) == raw
        assert hub.open_model(out).manifest["metadata"]["ignored_config_keys"] == ["harmless"]
    with pytest.raises(InputError, match="--ignore-config-keys absent: is not in"):
        hub.convert(ConvertConfig(source=str(folder), out=str(tmp_path / "no"), ignore_config_keys=("absent",)))


def rewrite_header(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = change(content[8:start].decode().rstrip()).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[start:])


def test_a_header_that_names_a_tensor_twice(folder: Path):
    name = "model.norm.weight"
    rewrite_header(
        folder, lambda header: f"{header[:-1]}, {json.dumps(name)}: {json.dumps(json.loads(header)[name])}}}"
    )
    assert_refused(folder, "model.safetensors", "its header names", "twice")


def test_a_header_that_is_too_large_to_read(folder: Path):
    rewrite_header(folder, lambda header: header + " " * 2**24)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes() + bytes(2**24))
    assert_refused(folder, "model.safetensors", "no supported model has more than 16,777,216")


def test_a_file_outside_the_folder_is_not_read(folder: Path, tmp_path: Path):
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        index = {"weight_map": dict.fromkeys(load_file(tmp_path / "outside.safetensors"), name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert_refused(folder, name, "no file of its folder")
