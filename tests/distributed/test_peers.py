"""Flags, environment and clusters of several processes; invalid flags."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launcher import run_code
from process_group import ROOT, free_port, start_process, wait_for_all

from jax_selftrain import cli
from jax_selftrain.config.metadata import Role, fields_with_role
from jax_selftrain.distributed.cluster import DistributedConfig, local_device_ids, resolve_cluster
from jax_selftrain.errors import InputError

COORDINATOR = ("--coordinator", "localhost:8476", "--num-processes", "2", "--process-id", "0")
SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_NODELIST": "node[003-004,007]",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


def set_variables(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def resolve(**given: Any) -> DistributedConfig | None:
    return resolve_cluster(DistributedConfig(**given), os.environ)


def test_commands_with_devices_take_the_flags_and_no_configuration_does(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text("models: [{name: a, model: b}]")  # sections, which have no flags
    for name in cli.DISTRIBUTED_COMMANDS:
        words = [f"--config={study}", "--out=c"] if name == "study" else required_options(name)
        options, given = cli.parse_command_line(name, [*COORDINATOR, "--heartbeat-timeout=7", *words])
        assert given == DistributedConfig("localhost:8476", 2, 0, heartbeat_timeout=7)
        assert options == cli.parse_command_line(name, words)[0]
    for name in ("demo", "import", "report"):
        with pytest.raises(InputError, match="unknown option `--coordinator`"):
            cli.parse_command_line(name, COORDINATOR)


def required_options(name: str) -> list[str]:
    words = []
    for field in fields_with_role(cli.COMMANDS[name].config_class, Role.REQUIRED):
        words += [f"--{field}", "0.5" if field == "weight" else "x"]
    return words


def test_flags_override_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"})
    assert resolve() == DistributedConfig("host:1", 4, 3)
    assert resolve(process_id=1, coordinator="[::1]:2") == DistributedConfig("[::1]:2", 4, 1)
    monkeypatch.setenv("JAX_PROCESS_ID", "three")
    with pytest.raises(InputError, match="JAX_PROCESS_ID=three: expected a whole number"):
        resolve()


def test_slurm_gives_the_coordinates_of_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, SLURM)
    found = resolve()
    assert found is not None
    assert (found.num_processes, found.process_id) == (3, 2)
    assert found.coordinator.startswith("node003:")
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "8476")
    assert resolve() == DistributedConfig("node003:8476", 3, 2)
    assert resolve(coordinator="other:9") == DistributedConfig("other:9", 3, 2)
    assert resolve(num_processes=1) is None, "one process, without detection"
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert resolve() is None, "a job of one task is one process"


def test_slurm_gives_each_task_one_gpu_by_its_number_or_shows_it_that_one_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert local_device_ids() is None, "no cluster: all that there are"
    set_variables(monkeypatch, SLURM | {"SLURM_LOCALID": "2"})
    assert local_device_ids() == [2]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert local_device_ids() == [2]
    for alone in ("0", "2", "GPU-5a3c"):  # --gpus-per-task=1: JAX would find no second one
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", alone)
        assert local_device_ids() is None


def test_gke_gives_the_coordinates_of_the_processes_of_a_tpu_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)  # as where there are TPUs
    variables = {"TPU_WORKER_HOSTNAMES": "localhost,b,c,d", "TPU_WORKER_ID": "2", "TPU_SKIP_MDS_QUERY": "1"}
    slices = {"MEGASCALE_COORDINATOR_ADDRESS": "localhost", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    set_variables(monkeypatch, variables | slices)
    assert resolve() == DistributedConfig("localhost:8482", 8, 6)
    set_variables(monkeypatch, {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"})
    set_variables(monkeypatch, {"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"})
    assert resolve() is None, "a slice of one host is one process"


def test_a_kubernetes_pod_without_a_job_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert resolve() is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--coordinator host", "--coordinator 'host': expected HOST:PORT"),
        ("--coordinator host:99999", "--coordinator 'host:99999': expected HOST:PORT"),
        ("--coordinator :80", "--coordinator ':80': expected HOST:PORT"),
        ("--coordinator host:1", "--coordinator: give --num-processes and --process-id, too"),
        ("--num-processes 4 --process-id 0", "--num-processes and --process-id: give --coordinator, too"),
        ("--process-id 0", "--process-id: give --coordinator and --num-processes, too"),
        (
            "--coordinator host:1 --num-processes 2 --process-id 2",
            "--process-id 2: 2 processes are numbered from 0 to 1",
        ),
        ("--coordinator host:1 --num-processes 2 --process-id -1", "--process-id -1: 2 processes are numbered"),
        ("--num-processes 0", "--num-processes 0: must be at least 1"),
        ("--num-processes two", "--num-processes: expected a whole number"),
        ("--heartbeat-timeout 0", "--heartbeat-timeout 0: must be at least 1"),
        ("--coordinator a:1 --coordinator b:1", "--coordinator is given twice"),
        ("--coordinator", "--coordinator needs a value: text"),
        ("--coordinater host:1", "unknown option `--coordinater`; did you mean `--coordinator`?"),
    ],
)
def test_invalid_flags_are_one_sentence(capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert cli.main(["sample", "--model", "m", "--out", "o", *words.split()]) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.count("\n") == 1
    assert message in error


def test_a_process_that_cannot_connect_fails_within_the_timeout() -> None:
    """No listener, unknown host, occupied port, missing process."""
    with socket.create_server(("", 0)) as listener:
        taken = listener.getsockname()[1]
        endpoints = [("localhost", free_port(), 1), ("nowhere.invalid", 80, 1), ("localhost", taken, 0)]
        group = [
            start_process(
                ["sample", "--model", "m", "--out", "o", "--initialization-timeout", 2],
                *("--coordinator", f"{host}:{port}", "--num-processes", 2, "--process-id", index),
            )
            for host, port, index in [*endpoints, ("localhost", free_port(), 0)]
        ]
        codes, errors = wait_for_all(group)
    assert codes == [75, 2, 2, 75], errors
    for text, message in zip(
        errors,
        (
            r"process 0 did not answer within 2 s",
            r"--coordinator nowhere.invalid:80: no such host",
            r"process 0 cannot listen on this port \(Address already in use\)",
            r"not all of 2 processes arrived within 2 s",
        ),
        strict=True,
    ):
        assert re.fullmatch(f"jax-selftrain sample: error: .*{message}.*", text.splitlines()[-1]), text


def test_one_process_starts_no_coordination_client(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Variables of clusters do not matter on a single machine."""
    code = """
import sys, jax
from jax_selftrain.cli import main
code = main()
assert not jax.distributed.is_initialized()
assert jax.process_count() == 1
sys.exit(code)
"""
    words = ("convert", tiny_model(), tmp_path / "ours", "--format", "flax")
    run = run_code(code, *words, KUBERNETES_SERVICE_HOST="10.0.0.1", SLURM_JOB_ID="7")
    assert run.returncode == 0, run.stderr


def test_an_abort_of_jax_does_not_precede_the_message_of_a_leaving_process() -> None:
    """JAX may call abort() while this process publishes its exit notice."""
    code = """
import ctypes, threading, time
from jax_selftrain.distributed import peers
from jax_selftrain.distributed.cluster import DistributedConfig

group = peers.PeerGroup(DistributedConfig("localhost:1", 2, 1), "jax-selftrain train")
group.announce_exit = lambda notice: (setattr(group, "leaving", notice), abort_elsewhere(), time.sleep(1))
peers._group = group
peers._install_sigabrt_handler()

def abort_elsewhere():
    libc, thread = ctypes.CDLL(None), ctypes.c_ulong()
    libc.pthread_create(ctypes.byref(thread), None, ctypes.cast(libc.abort, ctypes.c_void_p), None)

group.mark_lost([0])
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 75, run.stderr
    assert re.fullmatch("jax-selftrain train: error: process 0 of 2, .* was lost; .*\n", run.stderr), run.stderr
