"""Every mesh loads the same model; nothing is read or held twice."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_params import count_read_bytes
from models_factory import OF_EACH_TABLE, tiny_weights, write_tiny_hf_model
from parity_cases import case_tokens

from jax_selftrain import hub
from jax_selftrain.config import ConvertConfig
from jax_selftrain.distributed.mesh import make_mesh
from jax_selftrain.distributed.sharding import make_sharding_rules
from jax_selftrain.errors import InputError
from jax_selftrain.hub import safetensors_io
from jax_selftrain.hub.families import FAMILIES as TABLES
from jax_selftrain.io.json_files import read_json
from jax_selftrain.models import abstract_params, axis_sizes


def leaves(tree) -> list:
    return jax.tree.leaves(tree)


@pytest.mark.parametrize(
    ("mesh", "preset"), [("data=2,model=4", "tensor"), ("data=4,model=2", "fsdp"), ("data=8", "fsdp")]
)
@pytest.mark.parametrize("family", OF_EACH_TABLE)
def test_parameters_are_the_same_on_any_mesh(family: str, mesh: str, preset: str, tiny_model: Callable[..., Path]):
    heads = {} if family in ("gpt_neox", "gpt2", "gpt_neo") else {"num_attention_heads": 8, "head_dim": 16}
    folder = tiny_model(family, dtype="mixed", **heads)
    one, many = hub.load_model(folder, "data=1"), hub.load_model(folder, mesh, preset=preset)
    shardings = [leaf.sharding for leaf in leaves(abstract_params(many.config, rules=many.sharding_rules))]
    for here, there, sharding in zip(leaves(one.params), leaves(many.params), shardings, strict=True):
        assert there.sharding == sharding
        np.testing.assert_array_equal(np.asarray(here), np.asarray(there))


@pytest.mark.parametrize(
    ("family", "mesh", "preset"), [("gpt_neox", "data=2,model=4", "tensor"), ("qwen3", "data=4,model=2", "fsdp")]
)
def test_logits_are_the_same_on_eight_devices(family: str, mesh: str, preset: str, tiny_model: Callable[..., Path]):
    folder = tiny_model(family)
    tokens = case_tokens()[:, :64]
    one, many = hub.load_model(folder, "data=1"), hub.load_model(folder, mesh, preset=preset)
    # Sums run in another order over the devices: fp32 rounding, see REFERENCES in the parity test.
    np.testing.assert_allclose(many.logits(tokens), one.logits(tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("mesh", "preset"), [("data=1", "tensor"), ("data=2,model=4", "replicated"), ("data=2,model=4", "fsdp")]
)
def test_every_byte_is_read_once(mesh: str, preset: str, tiny_model: Callable[..., Path]):
    folder = tiny_model("gpt_neox")
    config = hub.open_model(folder).config
    rules = make_sharding_rules(preset, make_mesh(mesh), axis_sizes(config))
    with count_read_bytes() as sizes:
        safetensors_io.load_params(folder, TABLES["gpt_neox"], config, rules)
    assert sum(sizes) == sum(value.nbytes for value in tiny_weights(read_json(folder / "config.json")).values())


def anonymous_bytes() -> int:
    """Return the host memory of this process without mapped files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to see memory use")
def test_the_host_never_holds_a_second_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes: dict[str, Any] = {"num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}
    folder = write_tiny_hf_model(tmp_path, "llama", tokenizer=False, dtype="bfloat16", **sizes)
    config = hub.open_model(folder).config
    rules = make_sharding_rules("tensor", make_mesh("model=2"), axis_sizes(config))
    used, read_box = [], safetensors_io.read_box

    def measure(*arguments: Any) -> np.ndarray:
        used.append(anonymous_bytes())
        return read_box(*arguments)

    monkeypatch.setattr(safetensors_io, "read_box", measure)
    gc.collect()
    before = anonymous_bytes()
    params = safetensors_io.load_params(folder, TABLES["llama"], config, rules, np.dtype(np.float32))[0]
    arrays = [array.nbytes for array in leaves(params)]
    assert max(arrays) < sum(arrays) / 3
    # `device_put` is zero-copy. The rest: one tensor of the file, and what allocators keep for themselves.
    assert max(used) - before < 1.1 * sum(arrays) < sum(arrays) + max(arrays) / 2


def test_donating_loaded_parameters_does_not_touch_other_devices(tiny_model: Callable[..., Path]):
    model = hub.load_model(tiny_model("llama"), "data=4", preset="replicated")
    # On CPU the four devices may have adopted one and the same host buffer.
    donated, *others = [shard.data for shard in model.params["embed"]["embedding"].addressable_shards]
    before = np.array(donated)
    overwritten = jax.jit(lambda x: x.at[:].set(-7.0), donate_argnums=0)(donated)
    assert float(overwritten.max()) == -7.0
    for other in others:
        np.testing.assert_array_equal(np.asarray(other), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_cast_on_loading_from_either_kind_of_folder(dtype: str, tmp_path: Path):
    folder = write_tiny_hf_model(tmp_path / "hf", "llama", tokenizer=False, dtype="mixed")
    hub.convert(ConvertConfig(source=str(folder), out=str(tmp_path / "ours")))
    expected = tiny_weights(read_json(folder / "config.json"), dtype="mixed")["model.norm.weight"]
    for ref in (folder, tmp_path / "ours"):
        model = hub.load_model(ref, "data=2,model=2", dtype)
        assert {array.dtype for array in leaves(model.params)} == {jnp.dtype(dtype)}
        assert model.compute_dtype == jnp.dtype(dtype)
        scale = np.asarray(model.params["final_norm"]["scale"])
        np.testing.assert_array_equal(scale, expected.astype(np.float32).astype(jnp.dtype(dtype)))
    with pytest.raises(InputError, match="float16"):
        hub.load_model(folder, "data=1", "float16")


def test_our_folder_loads_onto_any_mesh(tmp_path: Path, tiny_model: Callable[..., Path]):
    hub.convert(ConvertConfig(source=str(tiny_model("gpt_neox")), out=str(tmp_path / "ours")))
    direct = leaves(hub.load_model(tiny_model("gpt_neox"), "data=1").params)
    for mesh, preset in (("data=2,model=4", "fsdp"), ("model=2", "tensor"), ("data=8", "replicated")):
        model = hub.load_model(tmp_path / "ours", mesh, preset=preset)
        for here, there in zip(direct, leaves(model.params), strict=True):
            np.testing.assert_array_equal(np.asarray(here), np.asarray(there))


def test_logits_take_any_number_of_rows_and_refuse_what_does_not_fit(tiny_model: Callable[..., Path]):
    model = hub.load_model(tiny_model("llama", max_position_embeddings=64), "data=4,model=2")
    tokens = case_tokens()[:1, :64].repeat(3, axis=0)
    logits = model.logits(tokens)
    assert logits.shape == (3, 64, 512)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits[0], logits[2])
    with pytest.raises(InputError, match="65 tokens are more than the model's 64"):
        model.logits(np.zeros((1, 65), int))
    with pytest.raises(InputError, match="0 to 511"):
        model.logits(np.full((1, 4), 512))
    with pytest.raises(InputError, match="whole numbers"):
        model.logits(np.zeros((1, 4)))
