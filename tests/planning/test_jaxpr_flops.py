"""FLOPs and bytes from a trace, against numbers that are worked out by hand."""

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
from jax_selftrain.planning.jaxpr_flops import flops, flops_by_dtype, per_device_bytes
from jax_selftrain.planning.pythia_shapes import config_only_folder
from jax_selftrain.planning.stage_programs import StageConfig, StageProgram, stage_program


def mesh_of(data: int, model: int) -> AbstractMesh:
    return AbstractMesh((data, model), AXES, axis_types=(AxisType.Explicit,) * 2)


def array(mesh: AbstractMesh, shape: tuple[int, ...], *spec: str | None, dtype: str = "float32"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def traced(mesh: AbstractMesh, function, *arguments):
    with mesh_context(mesh):
        return jax.jit(function).trace(*arguments).jaxpr


def test_a_product_counts_on_each_chip_the_part_that_lies_there():
    mesh = mesh_of(4, 2)
    x, w = array(mesh, (8, 16), "data"), array(mesh, (16, 64), None, "model")
    assert flops(traced(mesh, jnp.dot, x, w)) == 2 * (8 // 4) * 16 * (64 // 2)


def test_a_contracted_dimension_that_is_divided_counts_its_part():
    mesh = mesh_of(4, 2)
    x, w = array(mesh, (8, 16), "data", "model"), array(mesh, (16, 64), "model")

    def product(x, w):
        return jnp.einsum("bd,df->bf", x, w, out_sharding=NamedSharding(mesh, PartitionSpec("data")))

    assert flops(traced(mesh, product, x, w)) == 2 * 2 * 8 * 64


def test_loops_count_as_often_as_they_turn():
    mesh = mesh_of(1, 1)
    x, w, turns = array(mesh, (8, 8)), array(mesh, (8, 8)), jax.ShapeDtypeStruct((), jnp.int32)

    def run(x, w, turns):
        def inner(x, _):
            return jax.lax.fori_loop(0, turns, lambda _, x: jnp.dot(x, w), x), None

        return jax.lax.scan(inner, x, length=3)[0]

    program = traced(mesh, run, x, w, turns)
    assert flops(program, loop_trip_counts=(5,)) == 3 * 5 * 2 * 8**3
    with pytest.raises(ValueError, match="trip count"):
        flops(program)


def test_inside_a_shard_map_shapes_are_those_of_one_chip():
    mesh = mesh_of(4, 1)
    x, w = array(mesh, (8, 16), "data"), array(mesh, (16, 16))

    rows = PartitionSpec("data")

    def own(x, w):
        return jax.shard_map(jnp.dot, in_specs=(rows, PartitionSpec()), out_specs=rows)(x, w)

    assert flops(traced(mesh, own, x, w)) == 2 * 2 * 16 * 16


def test_bytes_are_those_of_a_chips_part_and_tiles_are_filled_up():
    mesh = mesh_of(4, 1)
    rows = array(mesh, (16, 128), "data", dtype="bfloat16")
    assert per_device_bytes([rows, rows], tile_padded=False) == 2 * 4 * 128 * 2
    thin = array(mesh, (64, 8, 32, 64), dtype="bfloat16")  # 64 columns in tiles that are 128 wide
    assert per_device_bytes(thin, tile_padded=True) == 2 * per_device_bytes(thin, tile_padded=False)
    turned = array(mesh, (512, 8, 64), dtype="bfloat16")  # lies with its 512 along the tile: nothing is wasted
    assert per_device_bytes(turned, tile_padded=True) == per_device_bytes(turned, tile_padded=False)


def work_for(stage: str, config: StageConfig, topology: str) -> StageProgram:
    return stage_program(PlanConfig(score_tokens=1), stage, parse_topology(topology), config, compile=False)


def flops_of(work: StageProgram) -> float:
    with mesh_context(work.mesh):
        return flops(jax.jit(work.function).trace(*work.abstract_args).jaxpr, work.loop_trip_counts)


def test_training_and_sampling_count_what_the_formulas_say():
    with config_only_folder("pythia-70m") as folder:
        layers, vocabulary = 6 * 12 * 512**2, 50304 * 512
        train = TrainConfig(model=folder, batch_size=8, seq_len=1024, steps=1, dtype="float32")
        attention = 6 * 4 * 1024 * 512  # two products of T × D for each token of a layer, forward
        # forward, and twice that backward, where the written-out attention is computed once more
        expected = 2 * 1024 * (6 * (layers + vocabulary) + 4 * attention)
        found = flops_of(work_for("train", train, "v5e:2x2"))
        assert found == pytest.approx(expected, rel=0.02)  # slices of the loss are filled up: 0.3 % here

        sample = SampleConfig(model=folder, batch_size=64, max_tokens=1024, dtype="bfloat16", samples=4096)
        blocks = sum(-(-page * 32 // 256) for page in range(32)) / 32
        keys = blocks * 256 + 32  # a page is always read whole
        per_token = 2 * (layers + vocabulary) + 6 * 4 * keys * 512
        assert flops_of(work_for("sample", sample, "v5e:2x2")) == pytest.approx(32 * 64 * per_token, rel=0.01)


@pytest.mark.parametrize("stage", ["sample", "train", "score"])
def test_work_on_each_chip_stays_the_same_from_four_chips_to_two_hundred_and_fifty_six(stage: str):
    found = []
    with config_only_folder("pythia-70m") as folder:
        for chips, topology in ((4, "v5e:2x2"), (16, "v5e:4x4"), (256, "v5e:16x16")):
            config: StageConfig = {
                "sample": SampleConfig(model=folder, batch_size=64, dtype="bfloat16", samples=16384),
                "train": TrainConfig(model=folder, batch_size=2 * chips, dtype="bfloat16", steps=1, seq_len=1024),
                "score": ScoreConfig(model=folder, dtype="bfloat16"),
            }[stage]
            found.append(flops_of(work_for(stage, config, topology)))
    assert max(found) <= 1.05 * min(found)


@pytest.mark.parametrize("machine", ["v5e:2x2", "h100:8"])
@pytest.mark.parametrize("stage", ["sample", "train", "score"])
def test_in_bfloat16_no_product_has_wider_operands_not_even_in_gradients(stage: str, machine: str):
    settings: dict[str, StageConfig] = {
        "sample": SampleConfig(batch_size=64, dtype="bfloat16", samples=4096),
        "train": TrainConfig(batch_size=16, dtype="bfloat16", steps=1, seq_len=1024, remat="full"),
        "score": ScoreConfig(dtype="bfloat16"),
    }
    with config_only_folder("pythia-14m") as folder:
        work = work_for(stage, replace(settings[stage], model=folder), machine)
        with mesh_context(work.mesh):
            program = jax.jit(work.function).trace(*work.abstract_args).jaxpr
    assert set(flops_by_dtype(program, work.loop_trip_counts)) == {"bfloat16"}


def test_gradients_of_frozen_weights_are_not_counted():
    """An adapter of rank r beside each matrix: forward, recomputed, and back to the input; nothing for the matrix."""
    found = {}
    with config_only_folder("pythia-70m") as folder:
        for dtype in ("float32", "bfloat16"):
            train = TrainConfig(model=folder, batch_size=8, seq_len=1000, steps=1, dtype=dtype, remat="full")
            whole, frozen = (
                flops_of(work_for("train", config, "v5e:2x2")) for config in (train, replace(train, lora_rank=8))
            )
            found[dtype] = whole, frozen
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=1e-3)
    matrices = 6 * 12 * 512**2 + 50304 * 512
    for whole, frozen in found.values():  # the adapters' own products take 4 % of it back
        assert whole - frozen == pytest.approx(2 * 2 * 1000 * matrices, rel=0.05)


def test_a_product_of_unlike_operands_counts_as_one_of_the_wider_type():
    mesh = mesh_of(1, 1)
    x, w = array(mesh, (8, 8)), array(mesh, (8, 8), dtype="bfloat16")

    def product(x, w, precision):
        return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), precision, preferred_element_type=jnp.float32)

    assert flops_by_dtype(traced(mesh, partial(product, precision="highest"), x, w)) == {"float32": 2 * 8**3}
    assert flops_by_dtype(traced(mesh, partial(product, precision=None), x, w)) == {"bfloat16": 2 * 8**3}
