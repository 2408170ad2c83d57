"""What several processes do together, and each on its own: entering and leaving, barriers, messages."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from jax_selftrain.distributed.cluster import DistributedConfig, resolve_cluster
from jax_selftrain.distributed.peers import BARRIER_TIMEOUT, RERUN_HINT, ExitNotice, client, connect, current, exit_now
from jax_selftrain.distributed.signals import sigterm_handler
from jax_selftrain.errors import Preempted, SelftrainError, UnavailableError

if TYPE_CHECKING:
    from jax.sharding import Mesh

_calls: Counter[str] = Counter()


@contextmanager
def distributed_context(config: DistributedConfig, *, program: str = "jax-selftrain") -> Iterator[None]:
    """What is done inside is done by all processes that were asked for, or that the cluster has; by this one where
    there are no others. Must be entered before JAX has started its devices.

    Args:
      asked: the flags.
      program: opens the sentence with which a process ends.

    Raises:
      InputError: flags that do not belong together, a coordinator that cannot be reached.
      UnavailableError: a process never came, or was lost.
    """
    cluster = resolve_cluster(config, os.environ)
    if cluster is None:
        yield
        return
    group = connect(cluster, program)
    try:
        yield
    except SelftrainError as error:
        group.shutdown(error.exit_code, str(error))
        raise
    except KeyboardInterrupt:
        group.shutdown(UnavailableError.exit_code, f"process {group.index} was interrupted; {RERUN_HINT}")
        raise
    except Exception as error:  # a defect, or what a lost process looks like: told to the others and raised again
        departure = group.diagnose(error)
        if departure is not None:
            group.shutdown(departure.code, departure.message)
            raise departure.error() from error
        said = " ".join(str(error).split())[:300]
        group.shutdown(1, f"process {group.index} of {group.count} failed: {type(error).__name__}: {said}")
        raise
    else:
        group.shutdown(0)


def hard_exit(code: int) -> None:
    """End the process if it was one of several: threads of JAX's may wait for lost ones for ever. Else do nothing."""
    if current() is not None:
        exit_now(code)


def barrier(name: str) -> None:
    """Wait for all processes; nothing where there is one.

    Raises:
      UnavailableError: one was lost, or did not come within BARRIER_SECONDS.
    """
    import jax

    if jax.process_count() == 1:
        return
    _with_timeout_message(lambda milliseconds: client().wait_at_barrier(_unique_key(name), milliseconds), name)


def broadcast_one_to_all(compute: Callable[[], Any]) -> Any:
    """What process 0 finds (plain data, as JSON), on every process; all must come here.

    Raises:
      UnavailableError: one was lost, or process 0 did not come within BARRIER_SECONDS.
      SelftrainError: what process 0 raised, on every process.
    """
    import jax

    if jax.process_count() == 1:
        return compute()
    key = f"jax_selftrain/messages/{_unique_key('message')}"
    if jax.process_index():
        said = json.loads(
            _with_timeout_message(lambda milliseconds: client().blocking_key_value_get(key, milliseconds), "process 0")
        )
        if "error" in said:
            raise ExitNotice(**said["error"]).error()
        return said["found"]
    try:
        found = compute()
    except SelftrainError as error:  # said on every process: one that stayed silent would be waited for
        client().key_value_set(key, json.dumps({"error": {"code": error.exit_code, "message": str(error)}}))
        raise
    if (group := current()) is not None:
        group.check_alive()
    client().key_value_set(key, json.dumps({"found": found}))
    return found


@contextmanager
def process_local(mesh: Mesh) -> Iterator[None]:
    """Work on a mesh of this process's devices, which needs no other process: the loss of one does not end it, but what
    needs everybody afterwards.

    SIGTERM, which in a program of several processes is otherwise a notice to all of them, stops this one.
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
    """Have the devices of a mesh meet along each of its axes.

    On CPUs even those of one process meet through the coordination service the first time, which later may be gone.
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
    """The processes that have neither left nor been lost, ascending."""
    import jax

    group = current()
    gone = {} if group is None else group.gone
    return [index for index in range(jax.process_count()) if index not in gone]


def _unique_key(name: str) -> str:
    """A name for this meeting: all processes come to all meetings in the same order."""
    _calls[name] += 1
    return f"{name}#{_calls[name]}"


def _with_timeout_message(wait: Callable[[int], Any], what: str) -> Any:
    import jax

    if (group := current()) is not None:
        group.check_alive()
    try:
        return wait(int(BARRIER_TIMEOUT * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise UnavailableError(
            f"not all processes came to {what!r} within {BARRIER_TIMEOUT:.0f} s, though none was lost; {RERUN_HINT}"
        ) from error
