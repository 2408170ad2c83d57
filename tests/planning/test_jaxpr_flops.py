"""FLOPs and bytes of a jaxpr against numbers computed by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jax_selftrain.config import PlanConfig, SampleConfig, ScoreConfig, TrainConfig
from jax_selftrain.distributed.mesh import AXES, mesh_context
from jax_selftrain.planning.hardware import parse_topology
from jax_selftrain.planning.jaxpr_flops import flops_by_dtype, per_device_bytes
from jax_selftrain.planning.planner import config_only_folder
from jax_selftrain.planning.stage_programs import StageConfig, StageProgram, stage_program


def make_abstract_mesh(data: int, model: int) -> AbstractMesh:
    return AbstractMesh((data, model), AXES, axis_types=(AxisType.Explicit,) * 2)


def array(mesh: AbstractMesh, shape: tuple[int, ...], *spec: str | None, dtype: str = "float32"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def trace(mesh: AbstractMesh, function, *arguments):
    with mesh_context(mesh):
        return jax.jit(function).trace(*arguments).jaxpr


def flops(program, loop_trip_counts=()):
    return sum(flops_by_dtype(program, loop_trip_counts).values())


def test_a_product_counts_its_shard_on_each_chip():
    mesh = make_abstract_mesh(4, 2)
    x, w = array(mesh, (8, 16), "data"), array(mesh, (16, 64), None, "model")
    assert flops(trace(mesh, jnp.dot, x, w)) == 2 * (8 // 4) * 16 * (64 // 2)


def test_a_sharded_contracted_dimension_counts_its_shard():
    mesh = make_abstract_mesh(4, 2)
    x, w = array(mesh, (8, 16), "data", "model"), array(mesh, (16, 64), "model")

    def product(x, w):
        return jnp.einsum("bd,df->bf", x, w, out_sharding=NamedSharding(mesh, PartitionSpec("data")))

    assert flops(trace(mesh, product, x, w)) == 2 * 2 * 8 * 64


def test_loops_count_with_their_trip_counts():
    mesh = make_abstract_mesh(1, 1)
    x, w, turns = array(mesh, (8, 8)), array(mesh, (8, 8)), jax.ShapeDtypeStruct((), jnp.int32)

    def run(x, w, turns):
        def inner(x, _):
            return jax.lax.fori_loop(0, turns, lambda _, x: jnp.dot(x, w), x), None

        return jax.lax.scan(inner, x, length=3)[0]

    program = trace(mesh, run, x, w, turns)
    assert flops(program, loop_trip_counts=(5,)) == 3 * 5 * 2 * 8**3
    with pytest.raises(ValueError, match="trip count"):
        flops(program)


def test_shapes_inside_a_shard_map_are_local():
    mesh = make_abstract_mesh(4, 1)
    x, w = array(mesh, (8, 16), "data"), array(mesh, (16, 16))

    rows = PartitionSpec("data")

    def own(x, w):
        return jax.shard_map(jnp.dot, in_specs=(rows, PartitionSpec()), out_specs=rows)(x, w)

    assert flops(trace(mesh, own, x, w)) == 2 * 2 * 16 * 16


def test_bytes_are_local_and_padded_to_tiles():
    mesh = make_abstract_mesh(4, 1)
    rows = array(mesh, (16, 128), "data", dtype="bfloat16")
    assert per_device_bytes([rows, rows], tile_padded=False) == 2 * 4 * 128 * 2
    thin = array(mesh, (64, 8, 32, 64), dtype="bfloat16")  # 64 columns in tiles that are 128 wide
    assert per_device_bytes(thin, tile_padded=True) == 2 * per_device_bytes(thin, tile_padded=False)
    turned = array(mesh, (512, 8, 64), dtype="bfloat16")  # 512 along the tile: no padding
    assert per_device_bytes(turned, tile_padded=True) == per_device_bytes(turned, tile_padded=False)


def make_program(stage: str, config: StageConfig, topology: str) -> StageProgram:
    return stage_program(PlanConfig(score_tokens=1), stage, parse_topology(topology), config, compile=False)


def count_flops(work: StageProgram) -> float:
    with mesh_context(work.mesh):
        return flops(jax.jit(work.function).trace(*work.abstract_args).jaxpr, work.loop_trip_counts)


def test_training_and_sampling_agree_with_the_formulas():
    with config_only_folder("pythia-70m") as folder:
        layers, vocabulary = 6 * 12 * 512**2, 50304 * 512
        train = TrainConfig(model=folder, batch_size=8, seq_len=1024, steps=1, dtype="float32")
        attention = 6 * 4 * 1024 * 512  # two products of T × D for each token of a layer, forward
        # forward, and twice that backward, where the written-out attention is computed once more
        expected = 2 * 1024 * (6 * (layers + vocabulary) + 4 * attention)
        found = count_flops(make_program("train", train, "v5e:2x2"))
        assert found == pytest.approx(expected, rel=0.02)  # slices of the loss are filled up: 0.3 % here

        sample = SampleConfig(model=folder, batch_size=64, max_tokens=1024, dtype="bfloat16", samples=4096)
        blocks = sum(-(-page * 32 // 256) for page in range(32)) / 32
        keys = blocks * 256 + 32  # the tail is always read whole
        per_token = 2 * (layers + vocabulary) + 6 * 4 * keys * 512
        assert count_flops(make_program("sample", sample, "v5e:2x2")) == pytest.approx(32 * 64 * per_token, rel=0.01)


@pytest.mark.parametrize("stage", ["sample", "train", "score"])
def test_flops_on_each_chip_are_constant_from_4_to_256_chips(stage: str):
    found = []
    with config_only_folder("pythia-70m") as folder:
        for chips, topology in ((4, "v5e:2x2"), (16, "v5e:4x4"), (256, "v5e:16x16")):
            config: StageConfig = {
                "sample": SampleConfig(model=folder, batch_size=64, dtype="bfloat16", samples=16384),
                "train": TrainConfig(model=folder, batch_size=2 * chips, dtype="bfloat16", steps=1, seq_len=1024),
                "score": ScoreConfig(model=folder, dtype="bfloat16"),
            }[stage]
            found.append(count_flops(make_program(stage, config, topology)))
    assert max(found) <= 1.05 * min(found)


@pytest.mark.parametrize("machine", ["v5e:2x2", "h100:8"])
@pytest.mark.parametrize("stage", ["sample", "train", "score"])
def test_in_bfloat16_all_products_have_bfloat16_operands(stage: str, machine: str):
    settings: dict[str, StageConfig] = {
        "sample": SampleConfig(batch_size=64, dtype="bfloat16", samples=4096),
        "train": TrainConfig(batch_size=16, dtype="bfloat16", steps=1, seq_len=1024, remat="full"),
        "score": ScoreConfig(dtype="bfloat16"),
    }
    with config_only_folder("pythia-14m") as folder:
        work = make_program(stage, replace(settings[stage], model=folder), machine)
        with mesh_context(work.mesh):
            program = jax.jit(work.function).trace(*work.abstract_args).jaxpr
    assert set(flops_by_dtype(program, work.loop_trip_counts)) == {"bfloat16"}


def test_gradients_of_frozen_weights_are_not_counted():
    """LoRA has no gradients of matrices: forward, recomputation, gradients of inputs."""
    found = {}
    with config_only_folder("pythia-70m") as folder:
        for dtype in ("float32", "bfloat16"):
            train = TrainConfig(model=folder, batch_size=8, seq_len=1000, steps=1, dtype=dtype, remat="full")
            whole, frozen = (
                count_flops(make_program("train", config, "v5e:2x2")) for config in (train, replace(train, lora_rank=8))
            )
            found[dtype] = whole, frozen
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=1e-3)
    matrices = 6 * 12 * 512**2 + 50304 * 512
    for whole, frozen in found.values():  # the adapters' own products take 4 % of it back
        assert whole - frozen == pytest.approx(2 * 2 * 1000 * matrices, rel=0.05)


def test_a_product_with_two_dtypes_counts_as_the_wider_one():
    mesh = make_abstract_mesh(1, 1)
    x, w = array(mesh, (8, 8)), array(mesh, (8, 8), dtype="bfloat16")

    def product(x, w, precision):
        return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), precision, preferred_element_type=jnp.float32)

    assert flops_by_dtype(trace(mesh, partial(product, precision="highest"), x, w)) == {"float32": 2 * 8**3}
    assert flops_by_dtype(trace(mesh, partial(product, precision=None), x, w)) == {"bfloat16": 2 * 8**3}
