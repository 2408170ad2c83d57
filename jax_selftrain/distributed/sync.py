"""Barriers, broadcasts and process-local work of a program of several processes."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from jax_selftrain.distributed.cluster import DistributedConfig, resolve_cluster
from jax_selftrain.distributed.peers import BARRIER_TIMEOUT, RERUN_HINT, ExitNotice, client, connect, current
from jax_selftrain.distributed.signals import sigterm_handler
from jax_selftrain.errors import Preempted, SelftrainError, UnavailableError

if TYPE_CHECKING:
    from jax.sharding import Mesh

_calls: Counter[str] = Counter()


@contextmanager
def distributed_context(config: DistributedConfig, *, program: str = "jax-selftrain") -> Iterator[None]:
    """Connect the processes of a program while inside.

    Enter it before JAX initializes its devices. `program` is the prefix of error messages.

    Raises:
      InputError: the flags are inconsistent, or the coordinator cannot be reached.
      UnavailableError: a process did not arrive, or was lost.
    """
    cluster = resolve_cluster(config, os.environ)
    if cluster is None:
        yield
        return
    group = connect(cluster, program)
    try:
        yield
    except SelftrainError as error:
        group.shutdown(ExitNotice(error.exit_code, str(error)))
        raise
    except KeyboardInterrupt:
        message = f"process {group.index} was interrupted; {RERUN_HINT}"
        group.shutdown(ExitNotice(UnavailableError.exit_code, message))
        raise
    except Exception as error:  # a defect, or the consequence of a lost process
        notice = group.diagnose(error)
        if notice is not None:
            group.shutdown(notice)
            raise notice.to_error() from error
        reason = " ".join(str(error).split())[:300]
        message = f"process {group.index} of {group.count} failed: {type(error).__name__}: {reason}"
        group.shutdown(ExitNotice(1, message))
        raise
    else:
        group.shutdown(ExitNotice(0, ""))


def hard_exit(code: int) -> None:
    """End one of several processes, even if JAX's threads wait for peers."""
    if (group := current()) is not None:
        group.exit_now(ExitNotice(code, ""))


def barrier(name: str) -> None:
    """Wait for all processes.

    Raises:
      UnavailableError: a process was lost, or did not arrive within BARRIER_TIMEOUT.
    """
    import jax

    if jax.process_count() == 1:
        return
    _call_with_timeout(lambda milliseconds: client().wait_at_barrier(_unique_key(name), milliseconds), name)


def broadcast_one_to_all(compute: Callable[[], Any], *, has_deadline: bool = True) -> Any:
    """Broadcast the result of `compute` on process 0, plain data, to all.

    Raises:
      UnavailableError: a process was lost, or, with a deadline, process 0 did not arrive within BARRIER_TIMEOUT.
      SelftrainError: the error of `compute` on process 0, on every process.
    """
    import jax

    if jax.process_count() == 1:
        return compute()
    key = f"jax_selftrain/messages/{_unique_key('message')}"
    if jax.process_index():
        text = _call_with_timeout(
            lambda milliseconds: client().blocking_key_value_get(key, milliseconds),
            "process 0",
            repeat=not has_deadline,
        )
        message = json.loads(text)
        if "error" in message:
            raise ExitNotice(*message["error"]).to_error()
        return message["result"]
    try:
        result = compute()
    except SelftrainError as error:  # the other processes wait for a message
        client().key_value_set(key, json.dumps({"error": (error.exit_code, str(error))}))
        raise
    _check_alive()
    client().key_value_set(key, json.dumps({"result": result}))
    return result


@contextmanager
def process_local(mesh: Mesh) -> Iterator[None]:
    """Work on a mesh of this process's devices, independently of other processes.

    The loss of a process does not end this work, but later collective work. SIGTERM, otherwise a notice to all
    processes, stops this process.
    """
    group = current()
    if group is None:
        yield
        return

    def stop() -> None:
        raise Preempted(f"stopped; {RERUN_HINT}")

    _warm_up_communicators(mesh)
    group.process_local_depth += 1
    try:
        with sigterm_handler(stop):
            yield
    finally:
        group.process_local_depth -= 1


def _warm_up_communicators(mesh: Mesh) -> None:
    """Run a collective along each axis of a mesh of CPU devices.

    The first one connects the devices through the coordination service, which may be gone later.
    """
    import jax
    import numpy as np
    from jax.sharding import PartitionSpec

    if mesh.devices.flat[0].platform != "cpu":
        return
    for axes in (*mesh.axis_names, mesh.axis_names):
        count = jax.shard_map(
            partial(jax.lax.psum, axis_name=axes), mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec()
        )
        jax.block_until_ready(jax.jit(count)(np.ones((), np.float32)))


def live_processes() -> list[int]:
    """Return the indices of the processes that have not ended, ascending."""
    import jax

    group = current()
    gone = {} if group is None else group.gone
    return [index for index in range(jax.process_count()) if index not in gone]


def _unique_key(name: str) -> str:
    """Append the number of calls; all processes make the same."""
    _calls[name] += 1
    return f"{name}#{_calls[name]}"


def _check_alive() -> None:
    """Raise the error of the first process that failed or was lost."""
    group = current()
    if group is not None and (notice := group.first_failure()) is not None:
        raise notice.to_error()


def _call_with_timeout(wait: Callable[[int], Any], name: str, *, repeat: bool = False) -> Any:
    import jax

    while True:
        _check_alive()
        try:
            return wait(int(BARRIER_TIMEOUT * 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            if not repeat:
                raise UnavailableError(
                    f"not all processes reached {name!r} within {BARRIER_TIMEOUT:.0f} s, though none was lost; "
                    f"{RERUN_HINT}"
                ) from error
