"""`jax-selftrain plan`, by formula and by compilation with libtpu."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from launcher import launch, run_command

from jax_selftrain import cli, hub
from jax_selftrain.config import PlanConfig, SampleConfig, ScoreConfig, TrainConfig, fill_options
from jax_selftrain.distributed.mesh import make_mesh, torus_axis_groups
from jax_selftrain.errors import InputError
from jax_selftrain.models import DecoderConfig
from jax_selftrain.planning import neox_config, plan_memory, table
from jax_selftrain.planning.hardware import parse_topology, topology_devices
from jax_selftrain.planning.planner import config_only_folder
from jax_selftrain.planning.stage_programs import StageProgram, collective_bytes, hbm_traffic, stage_program

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jax[tpu]'"
)
SAMPLE = SampleConfig(samples=256, max_tokens=64, batch_size=8, dtype="bfloat16")
TRAIN = TrainConfig(batch_size=16, seq_len=128, steps=10, dtype="bfloat16", remat="full")


def plan_rows(**options: Any) -> list[dict[str, Any]]:
    return plan_memory(PlanConfig(**{"sample": SAMPLE, "train": TRAIN} | options))["rows"]


def test_names_of_topologies_decide_chips_and_hosts():
    machines = [parse_topology(name) for name in ("v5e:2x2", "v5e:2x4", "v5e:4x4", "v4:2x2x4", "h100:8", "h100:4x8")]
    assert [m.one_host().name for m in machines[2:]] == ["v5e:2x2", "v4:2x2x1", "h100:8", "h100:8"]
    assert [(m.chips, m.hosts) for m in machines] == [(4, 1), (8, 1), (16, 4), (16, 4), (8, 1), (32, 4)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"topology": ("v5x:4x4",)}, "v5x"),
        ({"topology": ("v5e:4x4x4",)}, "is not a shape of v5e"),
        ({"topology": ("v5e",)}, "needs a shape of v5e"),
        ({"topology": ("h100:12",)}, "not a multiple of"),
        ({"model": "pythia-1.5b"}, "did you mean `pythia-1.4b`|pythia-1b"),
        ({"mesh": "data=8,model=1", "stage": ("sample",)}, "one host of v5e:4x4 has 4"),
        ({"mesh": "model=3", "stage": ("sample",), "compile": False}, "does not divide"),
        ({"score_tokens": None, "topology": ()}, "--topology"),
    ],
)
def test_an_invalid_plan_is_one_error_sentence(options: dict[str, Any], says: str):
    given: dict[str, Any] = {"model": "pythia-70m", "topology": ("v5e:4x4",), "compile": False} | options
    with pytest.raises(InputError, match=says):
        plan_rows(**given)


def test_an_unknown_stage_is_an_error_with_the_known_stages():
    with pytest.raises(InputError, match="--stage: expected one of sample, train, score, found 'smaple'"):
        cli.parse_command_line("plan", ["--model", "pythia-70m", "--topology", "v5e:4x4", "--stage", "smaple"])


def test_a_search_without_a_valid_mesh_raises_the_last_error():
    train = replace(TRAIN, batch_size=3)
    with pytest.raises(InputError, match="--batch-size 3 does not divide"):
        plan_rows(model="pythia-70m", topology=("v5e:4x4",), stage=("train",), train=train, search=True, compile=False)


def test_gpus_are_planned_by_formula_and_marked():
    result = plan_memory(
        PlanConfig(model="pythia-410m", topology=("h100:8",), sample=SAMPLE, train=TRAIN, score_tokens=10**6)
    )
    assert [row["stage"] for row in result["rows"]] == ["sample", "train", "score"]
    for row in result["rows"]:
        assert row["fits"]
        assert not row["compiled"]
        assert row["chip_hours"] > 0
    # parameters and two moments in float32 on eight chips; the batch is small
    state = 3 * 4 * 405_334_016 / 8
    assert result["rows"][1]["memory"]["arguments"] == pytest.approx(state, rel=0.01)
    assert "estimated by formula" in table(result)


def test_common_options_are_those_of_every_stage():
    common: dict[str, Any] = {"preset": "replicated", "dtype": "bfloat16", "mesh": "data=2"}
    rows = plan_rows(model="pythia-14m", topology=("h100:8",), **common)
    for row in rows:
        assert row["mesh"] == {"data": 2, "model": 1}
        assert (row["options"]["preset"], row["options"]["dtype"]) == ("replicated", "bfloat16")


def test_a_model_that_is_too_large_does_not_fit():
    (row,) = plan_rows(model="pythia-12b", topology=("v5e:2x2",), stage=("train",), compile=False)
    assert not row["fits"]


def test_a_search_ranks_settings_that_fit_and_keeps_the_batch_size():
    train = replace(TRAIN, batch_size=4)
    rows = plan_rows(
        model="pythia-1b", topology=("v5e:2x2",), stage=("train",), train=train, compile=False, search=True
    )
    assert {row["options"]["batch_size"] for row in rows} == {4}
    assert len({tuple(row["mesh"].values()) for row in rows}) > 1
    fitting = [row["tokens_per_second"] for row in rows if row["fits"]]
    assert fitting == sorted(fitting, reverse=True)
    assert all(row["fits"] for row in rows[: len(fitting)])


def test_the_command_prints_a_table_and_writes_the_plan(tmp_path: Path):
    out = tmp_path / "plan.json"
    words = ["plan", "--model", "pythia-14m", "--topology", "h100:8", "--stage", "sample", "--out", str(out)]
    done = run_command(*words)
    assert done.returncode == 0, done.stderr
    assert "| sample | h100:8 | data=8,model=1 |" in done.stdout
    assert json.loads(out.read_text())["rows"][0]["topology"] == "h100:8"


@pytest.mark.nightly
@needs_libtpu
def test_data_parallel_sampling_has_no_collectives_and_copies_no_cache():
    sample = SampleConfig(samples=4096, samples_per_shard=4096, max_tokens=1024, batch_size=64, dtype="bfloat16")
    options = PlanConfig(model="pythia-70m", topology=("v5e:2x2",), stage=("sample",), sample=sample)
    (row,) = plan_memory(options)["rows"]
    check_memory(row)
    assert sum(one["bytes"] for one in row["collectives"]) <= 16  # one number every 32 steps: all finished?
    with plan_program(options) as (work, model):
        least = hbm_traffic(work, model)
    assert row["traffic"] < 1.1 * least  # parameters and filled cache, read once in a step


def write_model(folder: Path, width: int) -> Path:
    config = neox_config(2, width, width // 64, vocabulary=2048) | {"max_position_embeddings": 256}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> PlanConfig:
    """Plan of a small model, compiled in a minute."""
    folder = write_model(tmp_path_factory.mktemp("small"), width=256)
    score = ScoreConfig(batch_tokens=4096, dtype="bfloat16")
    return PlanConfig(model=str(folder), topology=("v5e:2x2",), train=TRAIN, score=score, sample=SAMPLE)


@pytest.mark.nightly
@needs_libtpu
@pytest.mark.parametrize(("topology", "width"), [("v5e:2x2", 256), ("v5e:4x4", 512)])
def test_collectives_of_training_agree_with_the_formula(small: PlanConfig, tmp_path: Path, topology: str, width: int):
    options = replace(small, model=str(write_model(tmp_path, width)), stage=("train",), topology=(topology,))
    (row,) = plan_memory(options)["rows"]
    check_memory(row)
    with plan_program(options) as (work, model):
        expected = sum(one.bytes_received for one in collective_bytes(work, model))
    assert sum(one["bytes_received"] for one in row["collectives"]) == pytest.approx(expected, rel=0.05)


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "mesh", "lines"),
    [
        ("v5e:2x2", "data=4", [2, 2]),
        ("v5e:4x4", "data=16", [4, 4]),
        ("v5e:4x4", "data=8,model=2", [2, 4]),
        ("v4:2x2x4", "data=16", [2, 2, 4]),
        ("v5e:4x4", "data=4,model=4", []),
    ],
)
def test_replicas_are_row_by_row_in_the_torus(topology: str, mesh: str, lines: list[int]):
    made = make_mesh(mesh, topology_devices(parse_topology(topology)))
    coordinates = [device.coords for device in made.devices[:, 0]]
    assert coordinates == sorted(coordinates)
    found = torus_axis_groups(made)
    assert [len(groups[0]) for groups in found] == lines
    for groups in found:
        for group in groups:  # along a line one coordinate changes
            assert sum(len(set(values)) > 1 for values in zip(*[coordinates[k] for k in group], strict=True)) == 1


@pytest.mark.nightly
@needs_libtpu
def test_scoring_compiles(small: PlanConfig):
    (row,) = plan_memory(replace(small, stage=("score",)))["rows"]
    check_memory(row)
    assert row["traffic"] > row["memory"]["arguments"] - row["memory"]["aliased"] - 2**20  # all parameters are read


@needs_libtpu
@pytest.mark.parametrize(
    "topology",
    [
        "v6e:2x2",
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("v4:2x2x1", "v5p:2x2x1", "v5e:2x4", "v5e:4x4")),
    ],
)
def test_every_generation_compiles_for_the_chips_of_one_host(small: PlanConfig, topology: str):
    (row,) = plan_memory(replace(small, topology=(topology,), stage=("sample",)))["rows"]
    check_memory(row)
    assert row["num_meshes"] * row["mesh"]["data"] == row["chips"]


@pytest.mark.nightly
@needs_libtpu
def test_two_plans_can_run_at_once():
    words = ["plan", "--model", "pythia-14m", "--topology", "v5e:2x2", "--stage", "sample", "--dtype", "bfloat16"]
    both = [launch(*words, "--sample.samples", 64) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors


@needs_libtpu
def test_an_unknown_slice_is_an_error():
    with pytest.raises(InputError, match="libtpu does not know this slice"):
        plan_rows(model="pythia-14m", topology=("v5e:3x4",), stage=("sample",))


@pytest.mark.nightly
@needs_libtpu
def test_a_program_out_of_memory_has_the_message_of_the_compiler():
    sample = replace(SAMPLE, max_tokens=2048, batch_size=1024)
    (row,) = plan_rows(model="pythia-1b", topology=("v5e:2x2",), stage=("sample",), sample=sample)
    assert not row["fits"]
    assert "the compiler" in row["too_large"]


def check_memory(row: dict[str, Any]) -> None:
    """Assert that predicted and compiled memory agree within 2 %."""
    memory = row["memory"]
    assert row["compiled"]
    assert row["fits"]
    assert memory["arguments"] == pytest.approx(memory["compiled_arguments"], rel=0.02)
    assert memory["outputs"] == pytest.approx(memory["compiled_outputs"], rel=0.02)


@contextmanager
def plan_program(options: PlanConfig) -> Iterator[tuple[StageProgram, DecoderConfig]]:
    """Yield the program of the only stage on the only topology."""
    (stage,), (topology,) = options.stage, options.topology
    with config_only_folder(options.model) as folder:
        config = fill_options(options, getattr(options, stage), folder)
        program = stage_program(options, stage, parse_topology(topology), config, compile=False)
        yield program, hub.open_model(folder).config
