"""Tests of `round_trip` on several devices."""

from pathlib import Path

import jax
import numpy as np
from model_params import assert_same_tensors, load_tensors
from models_factory import write_tiny_hf_model

from jax_selftrain import hub
from jax_selftrain.distributed.mesh import mesh_context
from jax_selftrain.io.json_files import read_json


def test_trained_weights_are_exported_in_fp32(tmp_path: Path):
    source = write_tiny_hf_model(tmp_path / "hf", "gpt_neox", dtype="float16", torch_dtype="float16")
    model = hub.load_model(source, "data=2,model=2", preset="fsdp")
    with mesh_context(model.sharding_rules.mesh):
        params = jax.tree.map(lambda x: x * 1.0001, model.params)
    back = hub.save_model(tmp_path / "out", params, source=source, metadata={"step": 7})
    assert {value.dtype for value in load_tensors(back).values()} == {np.dtype(np.float32)}
    assert load_tensors(back).keys() == load_tensors(source).keys()
    assert read_json(back / "config.json")["torch_dtype"] == "float32"  # else transformers would round to fp16
    expected = np.asarray(params["embed"]["embedding"])
    np.testing.assert_array_equal(load_tensors(back)["gpt_neox.embed_in.weight"], expected)


def test_save_pretrained_writes_what_was_loaded(tmp_path: Path):
    source = write_tiny_hf_model(tmp_path / "hf", "qwen2", dtype="mixed")
    exact = hub.load_model(source, "data=2,model=2").save_pretrained(tmp_path / "exact")
    assert_same_tensors(load_tensors(exact), load_tensors(source))
    rounded = hub.load_model(source, "data=1", "bfloat16").save_pretrained(tmp_path / "rounded")
    assert {str(v.dtype) for v in load_tensors(rounded).values()} == {"bfloat16", "float16"}
