"""Merge models: exact at both ends, linear between and beyond."""

import dataclasses
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_input import flip_byte
from model_params import load_host_params, param_bytes
from models_factory import OF_EACH_TABLE, Family, write_model_pair, write_tiny_hf_model
from parity_cases import CASES, transformers_logits
from safetensors.numpy import load_file, save_file

from jax_selftrain import cli, hub
from jax_selftrain.config import ConvertConfig, MergeConfig
from jax_selftrain.errors import InputError
from jax_selftrain.io import json_files
from jax_selftrain.io.manifest import folder_manifest


def options(at: tuple[Path, Path], out: Path, weight: float, **changes: Any) -> MergeConfig:
    return MergeConfig(base=str(at[0]), student=str(at[1]), weight=weight, out=str(out), **changes)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_model_pair(tmp_path_factory.mktemp("models"), "llama")


@pytest.fixture(scope="module")
def merge_result(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merge with w = −0.5, away from the student."""
    return hub.merge(options(models, tmp_path_factory.mktemp("merge_result") / "out", -0.5))


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
@pytest.mark.parametrize("family", OF_EACH_TABLE)
def test_weights_0_and_1_are_the_models_bit_for_bit(family: Family, dtype, tmp_path: Path):
    base, student = write_model_pair(tmp_path, family, tokenizer=False, dtype=dtype)
    for weight, model in ((0.0, base), (1.0, student)):
        out = hub.merge(options((base, student), tmp_path / str(weight), weight))
        assert param_bytes(out) == param_bytes(model)


@pytest.mark.parametrize("case", ["neox", "neox-tied", "llama-gqa", "llama-tied", "qwen2-window", "qwen3"])
@pytest.mark.parametrize("weight", [-1.5, 0.3, 2.0])
def test_every_parameter_is_interpolated(case: str, weight: float, tmp_path: Path):
    family, changes = CASES[case]
    base, student = write_model_pair(tmp_path, family, tokenizer=False, **changes)
    found = load_host_params(hub.merge(options((base, student), tmp_path / "out", weight)))
    first, second = load_host_params(base), load_host_params(student)
    for name, value in found.items():
        b, s = first[name].astype(np.float64), second[name].astype(np.float64)
        # One rounding each of difference, weight, product and sum.
        room = 2.0**-24 * (3.1 * np.abs(weight * (s - b)) + np.abs(b + weight * (s - b))) + 1e-37
        assert (np.abs(value - (b + weight * (s - b))) <= room).all(), name


def test_equal_parameters_stay_for_every_weight(tmp_path: Path):
    base = write_tiny_hf_model(tmp_path / "base", "gpt_neox", tokenizer=False)
    student = Path(shutil.copytree(base, tmp_path / "student"))
    weights = load_file(student / "model.safetensors")
    weights["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"] *= 1.5
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    first, found = load_host_params(base), load_host_params(hub.merge(options((base, student), tmp_path / "out", 0.1)))
    assert {name for name in found if not np.array_equal(found[name], first[name])} == {
        "['layers']['mlp']['up']['kernel']"
    }


def test_weight_is_a_coordinate_on_the_line(models: tuple[Path, Path], merge_result: Path, tmp_path: Path):
    """One third from −0.5 to 1.0 is 0.0, the base."""
    back = load_host_params(hub.merge(options((merge_result, models[1]), tmp_path / "out", 1 / 3)))
    for name, value in load_host_params(models[0]).items():
        np.testing.assert_allclose(back[name], value, atol=2e-6)  # a few roundings of values up to about 10


# ---------------------------------------------------------------- files


def test_the_result_is_float32_and_its_manifest_names_both_models(models: tuple[Path, Path], merge_result: Path):
    local = {"commit": None, "license": None}
    record = json_files.read_json(merge_result / "selftrain.json")
    assert record["metadata"] == {
        "made_by": "merge",
        "weight": -0.5,
        "base": {"ref": str(models[0]), "fingerprint": hub.open_model(models[0]).fingerprint} | local,
        "student": {"ref": str(models[1]), "fingerprint": hub.open_model(models[1]).fingerprint} | local,
    }
    assert set(record["tensors"].values()) == {"float32"}
    assert hub.open_model(merge_result).tokenizer_fingerprint == hub.open_model(models[0]).tokenizer_fingerprint
    assert hub.open_model(merge_result).special_tokens == hub.open_model(models[0]).special_tokens


def test_narrow_models_give_a_float32_result(tmp_path: Path):
    at = write_model_pair(tmp_path, "gpt_neox", dtype="float16", torch_dtype="float16", tokenizer=False)
    out = hub.merge(options(at, tmp_path / "out", 0.5))
    assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {np.dtype(np.float32)}
    assert json_files.read_json(out / "config.json")["torch_dtype"] == "float32"


def test_orbax_trees_and_safetensors_merge_alike(models: tuple[Path, Path], merge_result: Path, tmp_path: Path):
    ours = hub.convert(ConvertConfig(source=str(models[1]), out=str(tmp_path / "ours")))
    assert param_bytes(hub.merge(options((models[0], ours), tmp_path / "out", -0.5))) == param_bytes(merge_result)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("family", OF_EACH_TABLE)
def test_transformers_opens_a_merge_with_our_logits(family: Family, tmp_path: Path):
    at = write_model_pair(tmp_path, family)
    out = hub.merge(options(at, tmp_path / "out", 0.25))
    tokens = np.arange(5, 69).reshape(2, 32)
    expected = hub.load_model(out, "data=1").logits(tokens)
    np.testing.assert_allclose(transformers_logits(out, tokens), expected, atol=1e-4)  # as for every model


def test_the_same_merge_is_not_repeated(
    models: tuple[Path, Path], merge_result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before = {path: path.stat().st_mtime_ns for path in merge_result.rglob("*")}
    moved = tuple(Path(shutil.copytree(model, tmp_path / model.name)) for model in models)
    assert hub.merge(options((moved[0], moved[1]), merge_result, -0.5)) == merge_result
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in merge_result.rglob("*")} == before


def test_the_command_takes_weights_below_zero(models: tuple[Path, Path], merge_result: Path, tmp_path: Path, capsys):
    words = ["merge", "--base", models[0], "--student", models[1], "--weight", "-0.5", "--out", tmp_path / "out"]
    assert cli.main([str(word) for word in words]) == 0
    assert f"written: {tmp_path / 'out'}" in capsys.readouterr().out
    assert param_bytes(tmp_path / "out") == param_bytes(merge_result)


# ---------------------------------------------------------------- errors


def test_another_merge_in_the_same_place_is_refused(models: tuple[Path, Path], merge_result: Path, tmp_path: Path):
    before = folder_manifest(merge_result)
    with pytest.raises(InputError, match=r"holds a merge with another weight \(before -0\.5, now 0\.5\)"):
        hub.merge(options(models, merge_result, 0.5))
    with pytest.raises(InputError, match="holds a merge with another student"):
        hub.merge(options((models[0], models[0]), merge_result, -0.5))
    with pytest.raises(InputError, match="already exists"):
        hub.merge(options(models, models[0], 0.5))
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InputError, match="already exists"):
        hub.merge(options(models, tmp_path / "file", 0.5))
    assert folder_manifest(merge_result) == before


def test_a_damaged_result_is_refused(models: tuple[Path, Path], merge_result: Path, tmp_path: Path):
    copy = Path(shutil.copytree(merge_result, tmp_path / "copy"))
    largest = copy / "model.safetensors"
    flip_byte(largest)
    with pytest.raises(InputError, match=rf"{largest.name}: checksum differs.* remove the folder"):
        hub.merge(options(models, copy, -0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32, "head_dim": 16}, "has hidden_size 32, but .* has 64"),
        ({"num_hidden_layers": 3}, "has num_layers 3, but .* has 2"),
        ({"tie_word_embeddings": True}, "has tie_word_embeddings True, but .* has False"),
        ({"rope_theta": 500000.0}, r"has rope/theta 500000\.0, but .* has 10000\.0"),
        ({"vocab_size": 400}, "has vocab_size 400, but .* has 512"),
    ],
)
def test_other_architectures_are_refused_by_the_field_that_differs(
    changes: dict[str, Any], message: str, models: tuple[Path, Path], tiny_model: Callable[..., Path], tmp_path: Path
):
    with pytest.raises(InputError, match=message):
        hub.merge(options((models[0], tiny_model("llama", **changes)), tmp_path / "out", 0.5))
    assert not (tmp_path / "out").exists()


def test_other_tokenizers_are_refused(models: tuple[Path, Path], tiny_model: Callable[..., Path], tmp_path: Path):
    for other in (tiny_model("llama", tokenizer_size=400), tiny_model("llama", tokenizer=False)):
        with pytest.raises(InputError, match=r"has tokenizer \w+, but .* has \w+"):
            hub.merge(options((models[0], other), tmp_path / "out", 0.5))


def test_results_that_are_not_finite_are_refused_by_name(models: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(InputError, match=r"with weight 3e\+38, embed/embedding would be infinite"):
        hub.merge(options(models, tmp_path / "out", 3e38))
    for weight in (1e39, float("nan"), float("-inf")):
        with pytest.raises(InputError, match=r"(expected|must be) a finite number"):
            hub.merge(options(models, tmp_path / "out", weight))
    with pytest.raises(InputError, match="`weight` is required"):
        hub.merge(dataclasses.replace(options(models, tmp_path / "out", 0.5), weight=None))
    assert not (tmp_path / "out").exists()
