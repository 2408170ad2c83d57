"""Model references, fingerprints, special tokens, and files of a model folder."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import transformers
from model_params import hash_params
from models_factory import BOS, BOS_ID, EOS_ID, tiny_config, tiny_texts, write_tiny_hf_model, write_tiny_tokenizer
from parity_cases import transformers_logits

from jax_selftrain import hub
from jax_selftrain.config import ConvertConfig
from jax_selftrain.errors import InputError
from jax_selftrain.hub.model_folder import MODEL_CARD
from jax_selftrain.io.json_files import read_json


@pytest.fixture(scope="module")
def safetensors_folder(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model("llama")`, written again in Hugging Face's format."""
    out = tmp_path_factory.mktemp("folder") / "out"
    return hub.convert(ConvertConfig(source=str(tiny_model("llama")), out=str(out), format="hf"))


@pytest.fixture(scope="module")
def orbax_folder(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model("llama")` with an Orbax tree of parameters."""
    out = tmp_path_factory.mktemp("folder") / "orbax"
    return hub.convert(ConvertConfig(source=str(tiny_model("llama")), out=str(out), format="flax"))


@pytest.mark.parametrize("kind", ["safetensors_folder", "orbax_folder"])
def test_a_reference_is_a_folder_or_a_run(
    kind: str, request: pytest.FixtureRequest, tiny_model: Callable[..., Path], tmp_path: Path
):
    folder = request.getfixturevalue(kind)
    assert hub.open_model(tiny_model("llama")).folder == tiny_model("llama")
    assert hub.open_model(str(folder)).folder == folder
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    with pytest.raises(InputError, match=r"no final model yet.*same train command"):
        hub.open_model(run)
    shutil.copytree(folder, run / "model")
    assert hub.open_model(run).folder == run / "model"
    assert hub.open_model(run).config == hub.open_model(tiny_model("llama")).config
    (run / "model" / "selftrain.json").unlink()
    if kind == "safetensors_folder":  # without its manifest it is a Hugging Face folder
        assert hub.open_model(run).folder == run / "model"


def test_a_model_is_opened_once_until_a_file_changes(tmp_path: Path):
    folder = write_tiny_hf_model(tmp_path / "m", "llama")
    model = hub.open_model(folder)
    assert hub.open_model(str(folder)) is hub.open_model(model) is model
    assert model.tokenizer is model.tokenizer
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7, 9]}')
    assert hub.open_model(folder).special_tokens.eos_token_ids == (2, 7, 9)


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("no/such/place/at-all", "no such model folder"),
        ("./nowhere", "no such model folder"),
        ("org/name", "download from the Hugging Face hub failed"),
        ("org/name@step1000", "download from the Hugging Face hub failed"),
        ("gpt-none", "download from the Hugging Face hub failed"),
    ],
)
def test_a_missing_model_is_reported_in_one_sentence(ref: str, message: str):
    with pytest.raises(InputError, match=message) as caught:
        hub.load_model(ref)
    assert str(caught.value).startswith(ref)
    assert "\n" not in str(caught.value)


def test_a_file_or_an_empty_folder_is_no_model(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        hub.open_model(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"config\.json is missing"):
        hub.open_model(tmp_path / "empty")


def test_the_format_of_an_earlier_version_is_refused(tmp_path: Path, tiny_model: Callable[..., Path]):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "run" / "model")
    (folder / "model.json").write_text("{}")
    assert hub.open_model(folder).folder == folder  # the file of another program
    (folder / "model.json").write_text('{"format": "jax_selftrain.model", "version": 2}')
    for ref in (folder, tmp_path / "run"):
        with pytest.raises(InputError, match=r"earlier version; make it again.*convert .* --format hf"):
            hub.open_model(ref)


@pytest.mark.parametrize("kind", ["safetensors_folder", "orbax_folder"])
def test_the_manifest_says_how_the_model_was_made(
    kind: str, request: pytest.FixtureRequest, tiny_model: Callable[..., Path]
):
    folder, source = request.getfixturevalue(kind), tiny_model("llama")
    manifest = read_json(folder / "selftrain.json")
    fingerprint = hub.open_model(source).fingerprint
    assert manifest["source"] == {"ref": str(source), "fingerprint": fingerprint, "commit": None, "license": None}
    assert manifest["tensors"]["model.norm.weight"] == "float32"
    weights = "params/manifest.json" if kind == "orbax_folder" else "model.safetensors"
    assert {"config.json", "tokenizer.json", "generation_config.json", weights} <= manifest["files"].keys()
    assert manifest["versions"]["jax"]
    assert (folder / "config.json").read_bytes() == (source / "config.json").read_bytes()
    card = (folder / MODEL_CARD).read_text()
    assert "library_name: transformers" in card
    assert "jax-selftrain convert" in card
    assert str(source) in card


def test_a_changed_file_is_named_and_deleting_the_manifest_accepts_it(safetensors_folder: Path, tmp_path: Path):
    folder = shutil.copytree(safetensors_folder, tmp_path / "copy")
    (folder / MODEL_CARD).write_text("# My model\n")  # a model card may be edited
    hub.load_model(folder, "data=1")
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors: checksum differs.*delete its selftrain\.json"):
        hub.load_model(folder, "data=1")
    (folder / "selftrain.json").unlink()
    hub.load_model(folder, "data=1")


def test_fingerprints_depend_on_config_and_weights_alone(
    safetensors_folder: Path, tmp_path: Path, tiny_model: Callable[..., Path]
):
    source = tiny_model("llama")
    again = hub.convert(ConvertConfig(source=str(source), out=str(tmp_path / "again"), format="hf"))
    assert hub.open_model(again).fingerprint == hub.open_model(safetensors_folder).fingerprint
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    assert hub.open_model(moved).fingerprint == hub.open_model(source).fingerprint
    other = write_tiny_hf_model(tmp_path / "other", "llama", seed=1)
    assert hub.open_model(other).fingerprint != hub.open_model(source).fingerprint
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert hub.open_model(moved).fingerprint != hub.open_model(source).fingerprint


def test_tokenizer_fingerprint_depends_on_what_makes_ids(
    safetensors_folder: Path, tmp_path: Path, tiny_model: Callable[..., Path]
):
    expected = hub.open_model(tiny_model("llama")).tokenizer_fingerprint
    assert hub.open_model(safetensors_folder).tokenizer_fingerprint == expected
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_tiny_tokenizer(folder, 512)
    assert hub.open_model(folder).tokenizer_fingerprint == expected  # a folder with nothing but a tokenizer
    content = read_json(folder / "tokenizer.json")
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content | {"truncation": truncation}))
    assert hub.open_model(folder).tokenizer_fingerprint == expected
    write_tiny_tokenizer(folder, 400)
    assert hub.open_model(folder).tokenizer_fingerprint != expected


def as_saved_long_ago(content: dict) -> None:
    """Write merges as text and leave out defaults, as tokenizers did before version 0.20."""
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    for step in ("pre_tokenizer", "decoder"):
        del content[step]["use_regex"]


def swap_merges(content: dict) -> None:
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def add_token(content: dict) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    content["added_tokens"].append({"id": 512, "content": "<new>", **flags})


def add_prefix_space(content: dict) -> None:
    content["pre_tokenizer"]["add_prefix_space"] = True


def add_bos(content: dict) -> None:
    bos = {"id": BOS, "ids": [BOS_ID], "tokens": [BOS]}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    single = [{"SpecialToken": {"id": BOS, "type_id": 0}}, text]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {BOS: bos},
    }


def without_special_tokens(content: dict) -> None:
    add_bos(content)
    content["post_processor"]["single"] = content["post_processor"]["single"][1:]
    content["post_processor"] = {"type": "Sequence", "processors": [content["post_processor"]]}


@pytest.mark.parametrize("change", [as_saved_long_ago, without_special_tokens])
def test_a_tokenizer_saved_otherwise_keeps_its_fingerprint(change: Callable[[dict], None], tmp_path: Path):
    assert _changed_fingerprint(change, tmp_path) == hub.open_model(tmp_path / "original").tokenizer_fingerprint


@pytest.mark.parametrize("change", [swap_merges, add_token, add_prefix_space, add_bos])
def test_a_tokenizer_of_other_ids_has_another_fingerprint(change: Callable[[dict], None], tmp_path: Path):
    assert _changed_fingerprint(change, tmp_path) != hub.open_model(tmp_path / "original").tokenizer_fingerprint


def _changed_fingerprint(change: Callable[[dict], None], folder: Path) -> str:
    for name in ("original", "changed"):
        (folder / name).mkdir()
        write_tiny_tokenizer(folder / name, 512)
    content = read_json(folder / "original" / "tokenizer.json")
    change(content)
    (folder / "changed" / "tokenizer.json").write_text(json.dumps(content))
    return hub.open_model(folder / "changed").tokenizer_fingerprint


@pytest.mark.parametrize(
    "name", ["AutoTokenizer", "PreTrainedTokenizerFast", "GPTNeoXTokenizerFast", "GPTNeoXTokenizer"]
)
def test_the_tokenizer_of_pythia_saved_by_transformers_keeps_its_fingerprint(name: str, data_dir: Path, tmp_path: Path):
    source = data_dir / "pythia-tokenizer"
    getattr(transformers, name).from_pretrained(source).save_pretrained(tmp_path)
    saved = hub.open_model(tmp_path)
    assert saved.tokenizer_fingerprint == hub.open_model(source).tokenizer_fingerprint
    texts = list(tiny_texts(200))
    assert saved.tokenizer(texts)["input_ids"] == hub.open_model(source).tokenizer(texts)["input_ids"]


def test_ids_without_a_token_are_listed(tmp_path: Path):
    """Embeddings may have more rows than tokens, and vocabularies may have holes (camembert-base)."""
    model = write_tiny_hf_model(tmp_path, "llama", tokenizer_size=400)
    content = read_json(model / "tokenizer.json")
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 402
    (model / "tokenizer.json").write_text(json.dumps(content))
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 402]}')
    found = special_tokens(model)
    assert (found.tokenizer_length, found.unused_ids, found.eos_token_ids) == (403, (399, 400, 401), (2, 402))


def special_tokens(model: Path) -> hub.SpecialTokens:
    return hub.open_model(model).special_tokens


def test_start_and_stop_ids(tmp_path: Path):
    model = write_tiny_hf_model(tmp_path / "m", "gpt_neox", tokenizer_size=400)
    assert special_tokens(model) == hub.SpecialTokens(1, 2, (2,), 400)
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    config = read_json(model / "config.json")
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": 9, "bos_token_id": 5}))
    assert special_tokens(model).eos_token_ids == (2, 7, 9)
    assert special_tokens(model).eos_token_id == 2  # the tokenizer's EOS ends a text
    assert special_tokens(model).bos_token_id == 1  # the tokenizer's BOS first
    settings = read_json(model / "tokenizer_config.json")
    del settings["bos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert special_tokens(model).bos_token_id == 5  # then the config's
    (model / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "bos_token_id"}))
    assert special_tokens(model).bos_token_id == EOS_ID  # then EOS
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": 512}))
    with pytest.raises(InputError, match=r"512.*do not belong together"):
        special_tokens(model)
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": "</s>"}))
    with pytest.raises(InputError, match="eos_token_id"):
        special_tokens(model)


def test_a_model_may_have_no_tokenizer(tmp_path: Path):
    folder = write_tiny_hf_model(tmp_path, "llama", tokenizer=False)
    model = hub.load_model(folder, "data=1")
    assert model.tokenizer is None
    assert model.special_tokens == hub.SpecialTokens(1, 2, (2,), None)
    for name in ("tokenizer", "tokenizer_fingerprint"):
        with pytest.raises(InputError, match="holds no tokenizer"):
            getattr(hub.open_model(folder), name)


def test_an_architecture_without_weights_can_be_read_but_not_loaded(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("gpt_neox")))
    write_tiny_tokenizer(tmp_path, 512)
    assert hub.open_model(tmp_path).config.num_layers == 2
    for use in (hub.load_model, lambda ref: hub.open_model(ref).fingerprint):
        with pytest.raises(InputError, match="holds no weights"):
            use(tmp_path)


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """The weights of `tiny_model("gpt_neox")`, saved as trained from a folder without weights."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "arch").mkdir()
    shutil.copyfile(tiny_model("gpt_neox") / "config.json", folder / "arch" / "config.json")
    write_tiny_tokenizer(folder / "arch", 512)
    params = hub.load_model(tiny_model("gpt_neox"), "data=1").params
    return hub.save_model(folder / "model", params, source=folder / "arch", metadata={"made_by": "train"})


def test_a_model_trained_from_an_architecture_is_saved(trained_folder: Path, tiny_model: Callable[..., Path]):
    expected, loaded = hub.load_model(tiny_model("gpt_neox"), "data=1"), hub.load_model(trained_folder, "data=1")
    assert loaded.special_tokens == expected.special_tokens
    assert hash_params(loaded.params) == hash_params(expected.params)
    assert read_json(trained_folder / "generation_config.json") == {"bos_token_id": 1, "eos_token_id": [2]}


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_transformers_opens_a_saved_model_with_our_logits(trained_folder: Path):
    from transformers import AutoTokenizer, GenerationConfig

    tokens = np.arange(64).reshape(2, 32)
    expected = hub.load_model(trained_folder, "data=1").logits(tokens)
    np.testing.assert_allclose(transformers_logits(trained_folder, tokens), expected, atol=1e-4)  # as for every model
    assert AutoTokenizer.from_pretrained(trained_folder).bos_token_id == 1
    assert GenerationConfig.from_pretrained(trained_folder).eos_token_id == [2]


def test_the_real_tokenizer_of_pythia(data_dir: Path):
    model = hub.open_model(data_dir / "pythia-tokenizer")
    assert model.special_tokens == hub.SpecialTokens(0, 0, (0,), 50277)
    assert model.tokenizer.encode("Hello world") == [12092, 1533]
