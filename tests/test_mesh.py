"""The mesh and the rules that place arrays on it."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jax_selftrain.errors import InputError
from jax_selftrain.mesh import make_layout, make_mesh, place

SIZES = {"embed": 64, "vocab": 512, "mlp": 172, "kv_heads": 4, "q_per_kv": 2}


def test_mesh_spec_is_read_and_an_axis_left_out_has_size_one():
    assert dict(make_mesh("data=4,model=2").shape) == {"data": 4, "model": 2}
    assert dict(make_mesh("model=4").shape) == {"data": 1, "model": 4}
    assert dict(make_mesh("").shape) == {"data": len(jax.devices()), "model": 1}


@pytest.mark.parametrize("spec", ["data", "data=0", "rows=2", "data=two", "data=-1"])
def test_unreadable_mesh_is_refused_in_one_sentence(spec):
    with pytest.raises(InputError, match="--mesh"):
        make_mesh(spec)


def test_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(InputError, match="needs 64 devices, but there are 8"):
        make_mesh("data=64")


def test_presets_place_parameters():
    mesh = make_mesh("data=4,model=2")
    axes = ("layers", "embed", "kv_heads", "q_per_kv", "head_dim")
    assert make_layout("replicated", mesh, SIZES).spec(axes) == PartitionSpec(None, None, None, None, None)
    assert make_layout("tensor", mesh, SIZES).spec(axes) == PartitionSpec(None, None, "model", None, None)
    assert make_layout("fsdp", mesh, SIZES).spec(axes) == PartitionSpec(None, "data", "model", None, None)
    assert make_layout("fsdp", mesh, SIZES).gathered(axes).spec == PartitionSpec(None, None, "model", None, None)


def test_key_value_heads_are_replicated_when_fewer_than_the_model_axis():
    layout = make_layout("tensor", make_mesh("model=8"), SIZES | {"kv_heads": 2, "q_per_kv": 8, "mlp": 256})
    assert layout.spec(("kv_heads", "q_per_kv")) == PartitionSpec(None, "model")


def test_heads_that_do_not_divide_list_the_legal_sizes():
    with pytest.raises(InputError, match=r"model=8 does not divide .* model can be 1, 2, 4$"):
        make_layout("tensor", make_mesh("model=8"), SIZES)
    with pytest.raises(
        InputError, match=r"data=8 does not divide this model's width 12; data can be 1, 2, 3, 4, 6, 12$"
    ):
        make_layout("fsdp", make_mesh("data=8"), SIZES | {"embed": 12})


def test_two_dimensions_on_one_mesh_axis_collide():
    layout = make_layout("fsdp", make_mesh("data=4"), SIZES)
    with pytest.raises(ValueError, match="collide"):
        layout.spec(("batch", "embed"))
    with pytest.raises(ValueError, match="no rule"):
        layout.spec(("rows",))


def test_place_puts_each_device_its_own_rows():
    layout = make_layout("tensor", make_mesh("data=4,model=2"), SIZES)
    array = np.arange(24).reshape(8, 3)
    placed = place(layout, array, ("batch", None))
    np.testing.assert_array_equal(placed, array)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
