"""What a reference means, what a model is called, and where its texts start and stop."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from models_factory import EOS_ID, tiny_config, write_tiny_hf_model, write_tiny_tokenizer

from jax_selftrain import hub
from jax_selftrain.config import ConvertConfig
from jax_selftrain.errors import InputError
from jax_selftrain.hub import weights_hash as hub_weights_hash
from jax_selftrain.hub.weights_hash import hash_weights
from jax_selftrain.io.atomic import read_json


@pytest.fixture(scope="module")
def ours(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model("llama")` as a model folder of ours."""
    out = tmp_path_factory.mktemp("converted") / "ours"
    return hub.convert(ConvertConfig(source=str(tiny_model("llama")), out=str(out)))


def test_a_reference_is_a_folder_or_a_run(ours: Path, tiny_model: Callable[..., Path], tmp_path: Path):
    assert hub.resolve(tiny_model("llama")) == tiny_model("llama")
    assert hub.resolve(str(ours)) == ours
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    with pytest.raises(InputError, match=r"no final model yet.*same train command"):
        hub.resolve(run)
    shutil.copytree(ours, run / "model")
    assert hub.resolve(run) == run / "model"
    assert hub.read_config(run) == hub.read_config(tiny_model("llama"))


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("no/such/place/at-all", "no such model folder"),
        ("./nowhere", "no such model folder"),
        ("org/name", "could not be fetched from the Hugging Face hub"),
        ("org/name@step1000", "could not be fetched from the Hugging Face hub"),
        ("gpt-none", "could not be fetched from the Hugging Face hub"),
    ],
)
def test_what_is_not_there_is_said_in_one_sentence(ref: str, message: str):
    with pytest.raises(InputError, match=message) as caught:
        hub.load_model(ref)
    assert str(caught.value).startswith(ref)
    assert "\n" not in str(caught.value)


def test_a_file_or_an_empty_folder_is_no_model(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        hub.resolve(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"config\.json is missing"):
        hub.resolve(tmp_path / "empty")


def test_our_folder_says_what_it_was_made_from(ours: Path, tiny_model: Callable[..., Path]):
    record = read_json(ours / "model.json")
    assert record["source"] == {
        "ref": str(tiny_model("llama")),
        "fingerprint": hub.model_fingerprint(tiny_model("llama")),
    }
    assert record["tensors"]["model.norm.weight"] == "float32"
    assert {"config.json", "tokenizer.json", "params/manifest.json"} <= record["files"].keys()
    assert record["versions"]["jax"]
    assert (ours / "config.json").read_bytes() == (tiny_model("llama") / "config.json").read_bytes()


def test_fingerprints_follow_the_weights_and_nothing_else(ours: Path, tmp_path: Path, tiny_model: Callable[..., Path]):
    source = tiny_model("llama")
    again = hub.convert(ConvertConfig(source=str(source), out=str(tmp_path / "again")))
    assert hub.model_fingerprint(again) == hub.model_fingerprint(ours)  # though Orbax writes other files each time
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    assert hub.model_fingerprint(moved) == hub.model_fingerprint(source)
    other = write_tiny_hf_model(tmp_path / "other", "llama", seed=1)
    assert hub.model_fingerprint(other) != hub.model_fingerprint(source)
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert hub.model_fingerprint(moved) != hub.model_fingerprint(source)


@pytest.mark.parametrize("small", [hub_weights_hash.FULL_HASH_LIMIT, 0], ids=["by numpy", "by devices"])
def test_the_weights_fingerprint_is_the_same_on_any_mesh_and_on_the_host(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, small: int
):
    monkeypatch.setattr(hub_weights_hash, "FULL_HASH_LIMIT", small)
    folder = tiny_model("gpt_neox", dtype="mixed")
    one = hub.load_model(folder, "data=1").params
    expected = hash_weights(one)
    assert hash_weights(hub.load_model(folder, "data=2,model=4", preset="fsdp").params) == expected
    host = {"embed": {"embedding": np.asarray(one["embed"]["embedding"])}, **{k: one[k] for k in one if k != "embed"}}
    assert hash_weights(host) == expected


def test_the_weights_fingerprint_sees_single_bits_order_types_and_names():
    base = {"a": {"x": np.arange(24, dtype=np.float32).reshape(2, 3, 4)}}
    seen = {hash_weights(base)}
    flipped = base["a"]["x"].copy()
    flipped.view(np.uint32)[1, 2, 3] ^= 1
    swapped = base["a"]["x"].copy()
    swapped[0, 0], swapped[1, 2] = base["a"]["x"][1, 2], base["a"]["x"][0, 0]
    signed = base["a"]["x"].copy()
    signed[0, 0, 0] = -0.0
    for other in (flipped, swapped, signed, base["a"]["x"].reshape(2, 4, 3), base["a"]["x"].astype(np.float16)):
        seen.add(hash_weights({"a": {"x": other}}))
    seen.add(hash_weights({"a": {"y": base["a"]["x"]}}))
    assert len(seen) == 7


def test_tokenizer_fingerprint_is_of_what_makes_ids(ours: Path, tmp_path: Path, tiny_model: Callable[..., Path]):
    expected = hub.tokenizer_fingerprint(tiny_model("llama"))
    assert hub.tokenizer_fingerprint(ours) == expected
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_tiny_tokenizer(folder, 512)
    assert hub.tokenizer_fingerprint(folder) == expected  # a folder with nothing but a tokenizer
    content = read_json(folder / "tokenizer.json")
    (folder / "tokenizer.json").write_text(json.dumps(content | {"truncation": {"max_length": 3}}))
    assert hub.tokenizer_fingerprint(folder) == expected
    write_tiny_tokenizer(folder, 400)
    assert hub.tokenizer_fingerprint(folder) != expected


def test_start_and_stop_ids(tmp_path: Path):
    model = write_tiny_hf_model(tmp_path / "m", "gpt_neox", tokenizer_size=400)
    assert hub.special_tokens(model) == hub.SpecialTokens(bos_token_id=1, eos_token_ids=(2,), tokenizer_length=400)
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    config = read_json(model / "config.json")
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": 9, "bos_token_id": 5}))
    assert hub.special_tokens(model).eos_token_ids == (2, 7, 9)
    assert hub.special_tokens(model).bos_token_id == 1  # the tokenizer's BOS goes first
    settings = read_json(model / "tokenizer_config.json")
    del settings["bos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert hub.special_tokens(model).bos_token_id == 5  # then the config's
    (model / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "bos_token_id"}))
    assert hub.special_tokens(model).bos_token_id == EOS_ID  # then EOS
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": 512}))
    with pytest.raises(InputError, match=r"512.*do not belong together"):
        hub.special_tokens(model)
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": "</s>"}))
    with pytest.raises(InputError, match="eos_token_id"):
        hub.special_tokens(model)


def test_a_model_may_have_no_tokenizer(tmp_path: Path):
    folder = write_tiny_hf_model(tmp_path, "llama", tokenizer=False)
    model = hub.load_model(folder, "data=1")
    assert model.tokenizer is None
    assert model.special_tokens == hub.SpecialTokens(bos_token_id=1, eos_token_ids=(2,), tokenizer_length=None)
    with pytest.raises(InputError, match="holds no tokenizer"):
        hub.load_tokenizer(folder)
    with pytest.raises(InputError, match="holds no tokenizer"):
        hub.tokenizer_fingerprint(folder)


def test_an_architecture_without_weights_can_be_read_but_not_loaded(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("gpt_neox")))
    write_tiny_tokenizer(tmp_path, 512)
    config, _ = hub.read_config(tmp_path)
    assert config.num_layers == 2
    for use in (hub.load_model, hub.model_fingerprint):
        with pytest.raises(InputError, match="holds no weights"):
            use(tmp_path)


def test_a_model_trained_from_an_architecture_is_saved(tmp_path: Path, tiny_model: Callable[..., Path]):
    (tmp_path / "arch").mkdir()
    raw = read_json(tiny_model("gpt_neox") / "config.json")
    (tmp_path / "arch" / "config.json").write_text(json.dumps(raw))
    write_tiny_tokenizer(tmp_path / "arch", 512)
    params = hub.load_model(tiny_model("gpt_neox"), "data=1").params
    hub.save_model(tmp_path / "trained", raw, params, source_ref=tmp_path / "arch", metadata={})
    out = hub.convert(ConvertConfig(source=str(tmp_path / "trained"), out=str(tmp_path / "hf"), format="hf"))
    expected = hub.load_model(tiny_model("gpt_neox"), "data=1")
    loaded = hub.load_model(out, "data=1")
    assert loaded.special_tokens == expected.special_tokens
    assert hash_weights(loaded.params) == hash_weights(params)


def test_the_real_tokenizer_of_pythia(data_dir: Path):
    special = hub.special_tokens(data_dir / "pythia-tokenizer")
    assert special == hub.SpecialTokens(bos_token_id=0, eos_token_ids=(0,), tokenizer_length=50277)
    assert hub.load_tokenizer(data_dir / "pythia-tokenizer").encode("Hello world") == [12092, 1533]
