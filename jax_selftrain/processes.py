"""Several processes as one program: how they find each other, wait for each other, and what becomes of a lost one.

JAX's own multi-controller runtime is the engine: every process runs the same command, process 0 hosts the coordination
service, and arrays on a mesh of all devices are computed together. What is added here is how it ends.

*Start.* `--coordinator`, `--num-processes` and `--process-id`, or JAX's own detection of Cloud TPU, GKE, Slurm and Open
MPI. Without any of them nothing is started: one process, as ever.

*Waiting.* Barriers and messages go through the coordination service, not through collectives of the devices: these have
no time limit that could be set, and keep the devices busy.

*Loss.* JAX would answer the loss of any process by aborting all others. Here its `jax_enable_recoverability` is set, so
that it does nothing, and a thread asks the service every second who is still there. Work that needs everybody ends with
one sentence and exit code 75, from that thread, since the main thread may wait for the lost one within a collective for
ever. Work that needs nobody (`on_its_own`) goes on to its end.

*Loss of process 0.* The coordination service goes with it, which JAX answers by abort() whatever it has been told (its
callback for this case fails with std::bad_cast, in 0.10.2 as in 0.12.0.1). So abort() is caught: on the thread that
polls the service it is the loss of process 0, treated as any other; elsewhere it is a defect and takes its course.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from jax_selftrain.errors import InputError, SelftrainError, Stopped, UnavailableError

if TYPE_CHECKING:
    from jax.sharding import Mesh

BARRIER_SECONDS = 3600.0
"""How long processes wait for one that lives but does not come."""
LEAVING_SECONDS = 15.0
"""How long process 0, which the others hang on, waits for them when it ends by an error."""
POLL_SECONDS = 1.0
"""How often each asks who is still there."""

_AGAIN = "what was finished stays, run the same command again to go on"
_DEPARTURES = "jax_selftrain/departures"


@dataclass(frozen=True)
class ProcessesConfig:
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


@dataclass(frozen=True)
class _Departure:
    """How a process ended: exit code and sentence."""

    code: int
    said: str

    def error(self) -> SelftrainError:
        kinds = {kind.exit_code: kind for kind in (SelftrainError, InputError, Stopped)}
        return kinds.get(self.code, UnavailableError)(self.said)


class _Group:
    """This process and its peers, from their meeting until this one leaves."""

    def __init__(self, config: ProcessesConfig, program: str):
        self.config, self.program = config, program
        self.coordinator = config.coordinator
        self.index, self.count = config.process_id or 0, config.num_processes or 1
        self.client: Any = None
        """Of the coordination service; None: not connected yet."""
        self.gone: dict[int, _Departure] = {}
        self.alone = 0
        """How many times `on_its_own` has been entered."""
        self.leaving: int | None = None
        """The exit code, once this process has nothing more to do with the others."""
        self._lock = threading.Lock()

    def watch(self) -> None:
        """Ask who is still there, again and again; ends with the process, or with the service."""
        import jax

        while True:
            try:
                present = self.client.get_live_nodes(list(range(self.count)))
                notes = self.client.key_value_dir_get(_DEPARTURES)
            except jax.errors.JaxRuntimeError:
                if self.leaving is not None:
                    return
                if not self.coordinator_answers():
                    self.lose([0])
                    return
                present, notes = range(self.count), []
            for key, note in notes:
                self.see(int(key.rpartition("/")[2]), _Departure(**json.loads(note)))
            self.lose([index for index in range(self.count) if index not in present])
            time.sleep(POLL_SECONDS)

    def lose(self, indices: list[int]) -> None:
        """Take note that these are there no more, unless they said good-bye."""
        for index in indices:
            who = f"process {index} of {self.count}"
            if index == 0:
                who += f", which the others meet at ({self.coordinator}),"
            self.see(index, _Departure(UnavailableError.exit_code, f"{who} was lost; {_AGAIN}"))

    def see(self, index: int, departure: _Departure) -> None:
        """Take note of how a process ended, and end with it if it is needed."""
        with self._lock:
            if index == self.index or index in self.gone:
                return
            self.gone[index] = departure
        if departure.code and not self.alone and self.leaving is None:
            self.end(departure)

    def require_everybody(self) -> None:
        """Raise how the first one ended that ended otherwise than well."""
        for departure in self.gone.values():
            if departure.code:
                raise departure.error()

    def end(self, departure: _Departure) -> NoReturn:
        """End this process, whatever its other threads are waiting for."""
        self.say_goodbye(departure)
        print(f"{self.program}: error: {departure.said}", file=sys.stderr)  # behind whatever JAX says of the loss
        _exit(departure.code)

    def leave(self, code: int, said: str = "") -> None:
        """End what this process has to do with the others."""
        import jax

        self.say_goodbye(_Departure(code, said))
        if self.index == 0 or self.coordinator_answers():
            jax.distributed.shutdown()

    def say_goodbye(self, departure: _Departure) -> None:
        """Tell the others how this process ends. Process 0 waits for theirs, since they hang on it."""
        self.leaving = departure.code
        if self.client is None or (self.index and not self.coordinator_answers()):
            return
        self.client.key_value_set(f"{_DEPARTURES}/{self.index}", json.dumps(asdict(departure)))
        deadline = time.monotonic() + (LEAVING_SECONDS if departure.code else BARRIER_SECONDS)
        while self.index == 0 and time.monotonic() < deadline:
            said = {int(key.rpartition("/")[2]) for key, _ in self.client.key_value_dir_get(_DEPARTURES)}
            if len(said | self.gone.keys() | {0}) == self.count:
                return
            time.sleep(0.05)

    def coordinator_answers(self) -> bool:
        """Whether somebody listens where process 0 should."""
        host, port = _host_and_port(self.coordinator)
        try:
            socket.create_connection((host, port), timeout=2).close()
        except OSError:
            return False
        return True

    def explain(self, error: Exception) -> _Departure | None:
        """The loss that an error of the main thread comes from, if it comes from one: it is seen at once by whoever
        waits for the lost process, and a little later by those who ask for signs of life."""
        import jax

        text = str(error)
        suspect = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in text
        deadline = time.monotonic() + (self.config.heartbeat_timeout + 15 if suspect or "Gloo" in text else 0)
        while True:
            for departure in list(self.gone.values()):
                if departure.code:
                    return departure
            if time.monotonic() > deadline:
                return None
            time.sleep(0.05)


_group: _Group | None = None
_calls: Counter[str] = Counter()


# ---------------------------------------------------------------- start and end


@contextmanager
def together(asked: ProcessesConfig, *, program: str = "jax-selftrain") -> Iterator[None]:
    """What is done inside is done by all processes that were asked for, or that the cluster has; by this one where
    there are no others. Must be entered before JAX has started its devices.

    Args:
      asked: the flags.
      program: opens the sentence with which a process ends.

    Raises:
      InputError: flags that do not belong together, a coordinator that cannot be reached.
      UnavailableError: a process never came, or was lost.
    """
    global _group
    config = _resolve(asked, os.environ)
    if config is None:
        yield
        return
    _group = _Group(config, program)
    _connect(_group)
    try:
        yield
    except SelftrainError as error:
        _group.leave(error.exit_code, str(error))
        raise
    except KeyboardInterrupt:
        _group.leave(UnavailableError.exit_code, f"process {_group.index} was interrupted; {_AGAIN}")
        raise
    except Exception as error:
        departure = _group.explain(error)
        if departure is not None:
            _group.leave(departure.code, departure.said)
            raise departure.error() from error
        said = " ".join(str(error).split())[:300]
        _group.leave(1, f"process {_group.index} of {_group.count} failed: {type(error).__name__}: {said}")
        raise
    else:
        _group.leave(0)


def finish(code: int) -> None:
    """End the process if it was one of several: threads of JAX's may wait for lost ones for ever. Else do nothing."""
    if _group is not None:
        _exit(code)


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _resolve(asked: ProcessesConfig, environment: Mapping[str, str]) -> ProcessesConfig | None:
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
        _host_and_port(config.coordinator)
    if config.num_processes != 1:
        given = {
            "--coordinator": config.coordinator or None,
            "--num-processes": config.num_processes,
            "--process-id": config.process_id,
        }
        missing = [flag for flag, value in given.items() if value is None]
        if missing:
            config = _as_the_cluster_says(config)
            if len(missing) < 3 and (not config.coordinator or None in (config.num_processes, config.process_id)):
                there = " and ".join(flag for flag in given if flag not in missing)
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


def _host_and_port(coordinator: str) -> tuple[str, int]:
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise InputError(f"--coordinator {coordinator!r}: expected HOST:PORT, for instance 10.0.0.2:8476")
    return host.strip("[]"), int(port)


def _as_the_cluster_says(config: ProcessesConfig) -> ProcessesConfig:
    """What is not given, as JAX's own detection of clusters has it; unchanged where there is none.

    JAX starts its service even for a cluster of one process and fails in a pod of Kubernetes that is no indexed job:
    hence its detection is asked here, before anything is started.
    """
    cluster = _cluster()
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


def _cluster() -> Any:
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


def _connect(group: _Group) -> None:
    """Meet the others."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # what happens to peers is told here, in one sentence
    import jax

    config = group.config
    if group.index == 0:
        _require_free_port(config.coordinator)
    else:
        _await_coordinator(group)
    jax.config.update("jax_enable_recoverability", True)
    _catch_abort()
    jax.distributed.initialize(
        config.coordinator,
        config.num_processes,
        config.process_id,
        local_device_ids=_local_device_ids(),
        cluster_detection_method="deactivate",
        initialization_timeout=config.initialization_timeout,
        heartbeat_timeout_seconds=config.heartbeat_timeout,
    )
    group.client = _client()
    threading.Thread(target=group.watch, name="peers", daemon=True).start()
    jax.local_devices()  # where devices start, all wait for all


def _local_device_ids() -> list[int] | None:
    """The GPU of a process that a cluster started for one of them; None: all devices of the machine."""
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    cluster = _cluster()
    if cluster is None or running_in_cloud_tpu_vm or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    index = cluster.get_local_process_id()
    return None if index is None else [index]


def _require_free_port(coordinator: str) -> None:
    if "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return
    _, port = _host_and_port(coordinator)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise InputError(
                f"--coordinator {coordinator}: process 0 cannot listen on this port ({error.strerror}); choose another"
            ) from error


def _await_coordinator(group: _Group) -> None:
    """Wait until process 0 listens: JAX would abort() when it does not come."""
    host, port = _host_and_port(group.coordinator)
    limit = group.config.initialization_timeout
    deadline = time.monotonic() + limit
    while not group.coordinator_answers():
        if time.monotonic() > deadline:
            try:
                socket.getaddrinfo(host, port)
            except OSError as error:
                raise InputError(f"--coordinator {group.coordinator}: no such host ({error.strerror})") from error
            raise UnavailableError(
                f"--coordinator {group.coordinator}: process 0 did not answer within {limit} s; is this the address of "
                "its machine, and has it been started there?"
            )
        time.sleep(0.2)


# ---------------------------------------------------------------- being one of several


def barrier(name: str) -> None:
    """Wait for all processes; nothing where there is one.

    Raises:
      UnavailableError: one was lost, or did not come within BARRIER_SECONDS.
    """
    import jax

    if jax.process_count() == 1:
        return
    _waited(lambda milliseconds: _client().wait_at_barrier(_once_more(name), milliseconds), name)


def from_process_0(find: Callable[[], Any]) -> Any:
    """What process 0 finds (plain data, as JSON), on every process; all must come here.

    Raises:
      UnavailableError: one was lost, or process 0 did not come within BARRIER_SECONDS.
      SelftrainError: what process 0 raised, on every process.
    """
    import jax

    if jax.process_count() == 1:
        return find()
    key = f"jax_selftrain/messages/{_once_more('message')}"
    if jax.process_index():
        said = json.loads(
            _waited(lambda milliseconds: _client().blocking_key_value_get(key, milliseconds), "process 0")
        )
        if "error" in said:
            raise _Departure(**said["error"]).error()
        return said["found"]
    try:
        found = find()
    except SelftrainError as error:  # said on every process: one that stayed silent would be waited for
        _client().key_value_set(key, json.dumps({"error": {"code": error.exit_code, "said": str(error)}}))
        raise
    if _group is not None:
        _group.require_everybody()
    _client().key_value_set(key, json.dumps({"found": found}))
    return found


@contextmanager
def on_its_own(mesh: Mesh) -> Iterator[None]:
    """Work on a mesh of this process's devices, which needs no other process: the loss of one does not end it, but what
    needs everybody afterwards.

    SIGTERM, which in a program of several processes is otherwise a notice to all of them, stops this one.
    """
    if _group is None:
        yield
        return

    def stop() -> None:
        raise Stopped(f"stopped; {_AGAIN}")

    _introduce(mesh)
    _group.alone += 1
    try:
        with listening_to_sigterm(stop):
            yield
    finally:
        _group.alone -= 1


def _introduce(mesh: Mesh) -> None:
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


def present() -> list[int]:
    """The processes that have neither left nor been lost, ascending."""
    import jax

    gone = {} if _group is None else _group.gone
    return [index for index in range(jax.process_count()) if index not in gone]


@contextmanager
def listening_to_sigterm(listener: Callable[[], object]) -> Iterator[None]:
    """Call `listener` on SIGTERM while inside; afterwards whatever listened before does so again.

    That may be a handler in C: JAX's, of preemption notices. Signals reach the main thread only, so that in another
    one nothing is listened to.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _libc().signal(signal.SIGTERM, signal.SIG_IGN)
    previous = signal.signal(signal.SIGTERM, lambda number, frame: listener())
    try:
        yield
    finally:
        if callable(previous):
            signal.signal(signal.SIGTERM, previous)
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _libc().signal(signal.SIGTERM, before)


def _once_more(name: str) -> str:
    """A name for this meeting: all processes come to all meetings in the same order."""
    _calls[name] += 1
    return f"{name}#{_calls[name]}"


def _waited(wait: Callable[[int], Any], what: str) -> Any:
    import jax

    if _group is not None:
        _group.require_everybody()
    try:
        return wait(int(BARRIER_SECONDS * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise UnavailableError(
            f"not all processes came to {what!r} within {BARRIER_SECONDS:.0f} s, though none was lost; {_AGAIN}"
        ) from error


def _client() -> Any:
    from jax._src import distributed

    if distributed.global_state.client is None:
        raise InputError("several processes must call jax.distributed.initialize() first; the command line does so")
    return distributed.global_state.client


# ---------------------------------------------------------------- abort()


def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    return libc


def _catch_abort() -> None:
    _libc().signal(signal.SIGABRT, ctypes.cast(_on_abort, ctypes.c_void_p))


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
    """Called on the thread that called abort(), which goes on with it if this returns."""
    group = _group
    if group is not None and group.leaving is not None:
        _exit(group.leaving)
    if group is not None and group.client is None:
        group.end(
            _Departure(
                UnavailableError.exit_code,
                f"--coordinator {group.coordinator}: not all of {group.count} processes came within "
                f"{group.config.initialization_timeout} s; start the missing ones, and this one again",
            )
        )
    ours = threading.get_ident() in {thread.ident for thread in threading.enumerate()}
    if group is not None and not ours and group.index and not group.coordinator_answers():
        group.lose([0])
        threading.Event().wait()  # this thread of JAX's has nothing left to do, the others go on
    _libc().signal(signal.SIGABRT, signal.SIG_DFL)
