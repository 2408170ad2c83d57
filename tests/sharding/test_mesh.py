"""The mesh and the sharding rules."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec

from jax_selftrain.distributed.mesh import (
    _group_lines,
    make_mesh,
    mesh_context,
    no_compilation_cache,
    torus_axis_groups,
)
from jax_selftrain.distributed.sharding import make_sharding_rules, shard_host_array
from jax_selftrain.errors import InputError

pytestmark = pytest.mark.compat

SIZES = {"embed": 64, "vocab": 512, "mlp": 172, "kv_heads": 4, "q_per_kv": 2}


def test_a_missing_axis_of_a_mesh_spec_has_size_one():
    assert dict(make_mesh("data=4,model=2").shape) == {"data": 4, "model": 2}
    assert dict(make_mesh("model=4").shape) == {"data": 1, "model": 4}
    assert dict(make_mesh("").shape) == {"data": len(jax.devices()), "model": 1}


@pytest.mark.parametrize("spec", ["data", "data=0", "rows=2", "data=two", "data=-1"])
def test_invalid_mesh_spec_is_refused_with_one_sentence(spec):
    with pytest.raises(InputError, match="--mesh"):
        make_mesh(spec)


def test_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(InputError, match="needs 64 devices, but there are 8"):
        make_mesh("data=64")


def test_presets_shard_parameters():
    mesh = make_mesh("data=4,model=2")
    axes = ("layers", "embed", "kv_heads", "q_per_kv", "head_dim")
    assert make_sharding_rules("replicated", mesh, SIZES).spec(axes) == PartitionSpec(None, None, None, None, None)
    assert make_sharding_rules("tensor", mesh, SIZES).spec(axes) == PartitionSpec(None, None, "model", None, None)
    assert make_sharding_rules("fsdp", mesh, SIZES).spec(axes) == PartitionSpec(None, "data", "model", None, None)
    assert make_sharding_rules("fsdp", mesh, SIZES).unsharded_embed(axes).spec == PartitionSpec(
        None, None, "model", None, None
    )


def test_key_value_heads_are_replicated_when_fewer_than_the_model_axis():
    rules = make_sharding_rules("tensor", make_mesh("model=8"), SIZES | {"kv_heads": 2, "q_per_kv": 8, "mlp": 256})
    assert rules.spec(("kv_heads", "q_per_kv")) == PartitionSpec(None, "model")


def test_heads_that_do_not_divide_list_the_legal_sizes():
    with pytest.raises(InputError, match=r"model=8 does not divide .* model can be 1, 2, 4$"):
        make_sharding_rules("tensor", make_mesh("model=8"), SIZES)
    with pytest.raises(
        InputError, match=r"data=8 does not divide this model's width 12; data can be 1, 2, 3, 4, 6, 12$"
    ):
        make_sharding_rules("fsdp", make_mesh("data=8"), SIZES | {"embed": 12})


def test_two_dimensions_on_one_mesh_axis_collide():
    rules = make_sharding_rules("fsdp", make_mesh("data=4"), SIZES)
    with pytest.raises(ValueError, match="collide"):
        rules.spec(("batch", "embed"))
    with pytest.raises(ValueError, match="no rule"):
        rules.spec(("rows",))


def test_shard_host_array_gives_each_device_its_rows():
    rules = make_sharding_rules("tensor", make_mesh("data=4,model=2"), SIZES)
    array = np.arange(24).reshape(8, 3)
    placed = shard_host_array(rules, array, ("batch", None))
    np.testing.assert_array_equal(placed, array)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}


def test_replicas_that_fill_a_box_of_a_torus_have_lines_along_its_dimensions():
    box = np.array([(i, j, 0, 0) for i in range(2) for j in range(3)])
    assert _group_lines(box[:, None]) == [[[0, 3], [1, 4], [2, 5]], [[0, 1, 2], [3, 4, 5]]]
    second = np.stack([box, box + np.array([0, 0, 1, 0])], axis=1)  # a model axis in the third dimension
    assert _group_lines(second) == _group_lines(box[:, None])
    assert _group_lines(box[[0, 1, 2, 3, 5, 4], None]) == []  # not row by row
    assert _group_lines(np.stack([box, box[::-1]], axis=1)) == []  # each replica's second device in another direction
    assert _group_lines(box[:3, None]) == []  # one line is a ring already
    assert _group_lines(box[:5, None]) == []  # no box


def test_gpus_have_coordinates_but_no_torus():
    """XLA's GPU clients describe devices like this."""
    devices = [SimpleNamespace(platform="gpu", coords=[k % 4], slice_index=k // 4) for k in range(8)]
    mesh: Any = SimpleNamespace(devices=np.array(devices).reshape(8, 1))
    assert torus_axis_groups(mesh) == []


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Path]:
    """An empty folder as JAX's compilation cache, which keeps everything."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    for name, value in zip(names, (str(tmp_path), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def program_over(mesh: jax.sharding.Mesh) -> None:
    """Compile (anew for this process) and run a program over a mesh."""
    rules = make_sharding_rules("replicated", mesh, SIZES)
    rows = shard_host_array(rules, np.arange(8.0), ("batch",))
    jax.jit(lambda x: jnp.sin(x) + mesh.size)(rows).block_until_ready()


def programs(kept: Path) -> set[str]:
    return {path.name for path in kept.iterdir() if "lambda" in path.name}


@pytest.mark.parametrize(("spec", "is_kept"), [("data=2", False), ("data=1", True)])
def test_programs_over_several_cpu_devices_are_not_cached(kept: Path, spec: str, is_kept: bool):
    mesh = make_mesh(spec)
    with mesh_context(mesh):
        program_over(mesh)
    assert bool(programs(kept)) == is_kept
    before = programs(kept)
    jax.jit(lambda x: x + 1)(np.arange(3.0)).block_until_ready()
    assert programs(kept) > before  # what holds inside ends outside


def test_programs_over_several_cpu_devices_are_not_read_from_the_cache(kept: Path):
    mesh = make_mesh("data=2")
    events: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    hit = "/jax/compilation_cache/cache_hits"
    with jax.set_mesh(mesh):
        program_over(mesh)  # is kept
        program_over(mesh)
    assert events.count(hit) == 1
    with mesh_context(mesh):
        program_over(mesh)
    assert events.count(hit) == 1


def test_the_cache_is_off_until_the_last_of_overlapping_programs_is_done():
    def is_on() -> bool:
        return jax.config.values["jax_enable_compilation_cache"]

    assert is_on()
    first, second = no_compilation_cache(), no_compilation_cache()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not is_on()
    second.__exit__(None, None, None)
    assert is_on()
    with pytest.raises(KeyError), no_compilation_cache():
        raise KeyError
    assert is_on()
