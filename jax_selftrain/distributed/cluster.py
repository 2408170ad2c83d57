"""Discovery of the processes of a program: flags, environment, or a cluster."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jax_selftrain.config import yaml_io
from jax_selftrain.config.metadata import AtLeastOne
from jax_selftrain.errors import InputError, UnavailableError


@dataclass(frozen=True)
class DistributedConfig:
    """Coordinates of the processes of a program."""

    coordinator: str = ""
    """HOST:PORT of process 0. Unset: JAX_COORDINATOR_ADDRESS, else detected (Cloud TPU, GKE, Slurm, Open MPI), else a
    single process."""
    num_processes: AtLeastOne[int | None] = None
    """Number of processes of this command. Unset: JAX_NUM_PROCESSES, else detected. 1: a single process, without
    detection."""
    process_id: int | None = None
    """Index of this process, from 0. Unset: JAX_PROCESS_ID, else detected."""
    initialization_timeout: AtLeastOne[int] = 300
    """Seconds to wait for all processes at the start."""
    heartbeat_timeout: AtLeastOne[int] = 30
    """Seconds without a heartbeat after which a process is lost."""


def resolve_cluster(flags: DistributedConfig, environment: Mapping[str, str]) -> DistributedConfig | None:
    """Complete the flags from the environment; None: a single process.

    Raises:
      InputError: a value is missing or invalid.
      UnavailableError: the cluster does not describe its processes.
    """
    config = replace(
        flags,
        coordinator=flags.coordinator or environment.get("JAX_COORDINATOR_ADDRESS", ""),
        num_processes=_read_int(flags.num_processes, "JAX_NUM_PROCESSES", environment),
        process_id=_read_int(flags.process_id, "JAX_PROCESS_ID", environment),
    )
    yaml_io.check_ranges(config)
    if config.coordinator:
        host_and_port(config.coordinator)
    if config.num_processes != 1:
        values = {
            "--coordinator": config.coordinator or None,
            "--num-processes": config.num_processes,
            "--process-id": config.process_id,
        }
        missing = [flag for flag, value in values.items() if value is None]
        if missing:
            config = _from_cluster_env(config)
            if len(missing) < 3 and (not config.coordinator or None in (config.num_processes, config.process_id)):
                given = " and ".join(flag for flag in values if flag not in missing)
                raise InputError(f"{given}: give {' and '.join(missing)}, too; no cluster was detected")
    count, index = config.num_processes, config.process_id or 0
    if count is not None and not 0 <= index < count:
        raise InputError(f"--process-id {index}: {count} processes are numbered from 0 to {count - 1}")
    return None if count in (None, 1) else config


def _read_int(flag: int | None, variable: str, environment: Mapping[str, str]) -> int | None:
    text = environment.get(variable, "")
    if flag is not None or not text:
        return flag
    if not text.isdigit():
        raise InputError(f"{variable}={text}: expected a whole number; correct it, or unset it")
    return int(text)


def host_and_port(coordinator: str) -> tuple[str, int]:
    """Split HOST:PORT, or raise InputError."""
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise InputError(f"--coordinator {coordinator!r}: expected HOST:PORT, for instance 10.0.0.2:8476")
    return host.strip("[]"), int(port)


def _from_cluster_env(config: DistributedConfig) -> DistributedConfig:
    """Complete the configuration with JAX's cluster detection.

    `jax.distributed.initialize` would start its service even for one process, and fail in a Kubernetes pod that is not
    part of an indexed job: so the detection runs here first.
    """
    cluster = detect_cluster()
    if cluster is None:
        return config
    try:
        count = config.num_processes or cluster.get_process_count()
        if count == 1:
            return replace(config, num_processes=1)
        index = cluster.get_process_id() if config.process_id is None else config.process_id
        address = config.coordinator or cluster.get_coordinator_address(
            timeout_secs=config.initialization_timeout,
            override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT"),
        )
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UnavailableError(f"{cluster.__name__}: does not describe its processes ({reason})") from error
    return replace(config, coordinator=address, num_processes=count, process_id=index)


def detect_cluster() -> Any:
    """Return JAX's class for the cluster of this process, or None."""
    from jax._src.clusters import ClusterEnv

    for cluster in ClusterEnv._cluster_types:
        if cluster.opt_in_only_method:
            continue
        if cluster.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ:
            continue
        if cluster.is_env_present():
            return cluster
    return None


def local_device_ids() -> list[int] | None:
    """Return the GPU of a cluster's process; None: all visible devices.

    JAX numbers the GPUs in `CUDA_VISIBLE_DEVICES`: a single visible GPU (Slurm's `--gpus-per-task=1`) has number 0.
    """
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    cluster = detect_cluster()
    if cluster is None or running_in_cloud_tpu_vm or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    index = cluster.get_local_process_id()
    return None if index is None or len(visible) == 1 else [index]
