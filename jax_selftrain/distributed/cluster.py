"""How several processes find each other: by flags, by JAX's own variables, or as a cluster says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jax_selftrain.errors import InputError, UnavailableError


@dataclass(frozen=True)
class DistributedConfig:
    """How several processes find each other; says nothing about what they do."""

    coordinator: str = ""
    """HOST:PORT of process 0, where all processes meet; unset: JAX_COORDINATOR_ADDRESS, else as Cloud TPU, GKE, Slurm
    or Open MPI say, else there is this process alone."""
    num_processes: int | None = None
    """How many processes run this command; unset: JAX_NUM_PROCESSES, else as the cluster says. 1: this one alone,
    whatever the cluster says."""
    process_id: int | None = None
    """Which of them this is, from 0; unset: JAX_PROCESS_ID, else as the cluster says."""
    initialization_timeout: int = 300
    """Seconds to wait at the start until all processes have come."""
    heartbeat_timeout: int = 30
    """Seconds after which a process that gives no sign of life counts as lost."""


def resolve_cluster(asked: DistributedConfig, environment: Mapping[str, str]) -> DistributedConfig | None:
    """What was asked for, completed by the environment; None: this process is alone.

    Raises:
      InputError: some of it is missing or impossible.
    """
    for name in ("initialization_timeout", "heartbeat_timeout"):
        if getattr(asked, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(asked, name)}: must be at least 1 second")
    config = replace(
        asked,
        coordinator=asked.coordinator or environment.get("JAX_COORDINATOR_ADDRESS", ""),
        num_processes=_number(asked.num_processes, "JAX_NUM_PROCESSES", environment),
        process_id=_number(asked.process_id, "JAX_PROCESS_ID", environment),
    )
    if config.num_processes is not None and config.num_processes < 1:
        raise InputError(f"--num-processes {config.num_processes}: must be at least 1")
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
                there = " and ".join(flag for flag in values if flag not in missing)
                raise InputError(f"{there}: give {' and '.join(missing)}, too; this is no cluster that would tell")
    count, index = config.num_processes, config.process_id or 0
    if count is not None and not 0 <= index < count:
        raise InputError(f"--process-id {index}: {count} processes are numbered from 0 to {count - 1}")
    return None if count in (None, 1) else config


def _number(given: int | None, variable: str, environment: Mapping[str, str]) -> int | None:
    text = environment.get(variable, "")
    if given is not None or not text:
        return given
    if not text.isdigit():
        raise InputError(f"{variable}={text}: expected a whole number; correct it, or unset it")
    return int(text)


def host_and_port(coordinator: str) -> tuple[str, int]:
    """Take HOST:PORT apart.

    Raises:
      InputError: it is none.
    """
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise InputError(f"--coordinator {coordinator!r}: expected HOST:PORT, for instance 10.0.0.2:8476")
    return host.strip("[]"), int(port)


def _from_cluster_env(config: DistributedConfig) -> DistributedConfig:
    """What is not given, as JAX's own detection of clusters has it; unchanged where there is none.

    JAX starts its service even for a cluster of one process and fails in a pod of Kubernetes that is no indexed job:
    hence its detection is asked here, before anything is started.
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
        said = " ".join(str(error).split())
        raise UnavailableError(f"{cluster.__name__}: does not tell which processes there are ({said})") from error
    return replace(config, coordinator=address, num_processes=count, process_id=index)


def detect_cluster() -> Any:
    """JAX's class for the cluster that this process was started by, or None."""
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
    """The GPU of a process that a cluster started for one of them; None: all devices that the process sees.

    JAX numbers those that `CUDA_VISIBLE_DEVICES` names: where the cluster has shown a process one GPU alone (Slurm's
    `--gpus-per-task=1`), that is its number 0, whichever of the machine's it is.
    """
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    cluster = detect_cluster()
    if cluster is None or running_in_cloud_tpu_vm or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    index = cluster.get_local_process_id()
    return None if index is None or len(visible) == 1 else [index]
