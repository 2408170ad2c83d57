"""The processes of a program: heartbeats, loss of a peer, exit.

A thread polls the coordination service. When a process that the others need is lost, this thread ends the program with
one sentence, since the main thread may wait in a collective forever.

Process 0 hosts the coordination service. JAX answers its loss by abort() in a thread of its own; the Python callback
for this case fails with std::bad_cast (0.10.2, 0.12.0.1). So a SIGABRT handler treats it as the loss of process 0.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NamedTuple, NoReturn

from jax_selftrain.distributed.cluster import DistributedConfig, host_and_port, local_device_ids
from jax_selftrain.distributed.signals import libc
from jax_selftrain.errors import InputError, Preempted, SelftrainError, UnavailableError

BARRIER_TIMEOUT = 3600.0
"""Seconds to wait for a live process that does not arrive."""
SHUTDOWN_TIMEOUT = 15.0
"""Seconds that process 0, which hosts the service, waits for the others when it ends by an error."""
POLL_INTERVAL = 1.0
"""Seconds between polls of the live processes."""

RERUN_HINT = "finished work is kept; run the same command again to resume"
_EXIT_NOTICES = "jax_selftrain/exit_notices"


class ExitNotice(NamedTuple):
    """Exit code and error message of a process."""

    code: int
    message: str

    def to_error(self) -> SelftrainError:
        kinds = {kind.exit_code: kind for kind in (SelftrainError, InputError, Preempted)}
        return kinds.get(self.code, UnavailableError)(self.message)


class PeerGroup:
    """A process and its peers."""

    def __init__(self, config: DistributedConfig, program: str):
        self.config, self.program = config, program
        self.index, self.count = config.process_id or 0, config.num_processes or 1
        self.client: Any = None
        """Client of the coordination service; None: not connected yet."""
        self.gone: dict[int, ExitNotice] = {}
        self.process_local_depth = 0
        """Number of active `process_local` contexts."""
        self.leaving: ExitNotice | None = None
        """Exit notice of this process, once it leaves the group."""
        self._lock = threading.Lock()

    def run_monitor(self) -> None:
        """Poll the live processes until the process or the service ends."""
        import jax

        while True:
            try:
                live = self.client.get_live_nodes(list(range(self.count)))
                notices = self.client.key_value_dir_get(_EXIT_NOTICES)
            except jax.errors.JaxRuntimeError:
                if self.leaving is not None:
                    return
                if not self.is_coordinator_alive():
                    self.mark_lost([0])
                    return
                live, notices = range(self.count), []
            for key, notice in notices:
                self.record_exit(int(key.rpartition("/")[2]), ExitNotice(*json.loads(notice)))
            self.mark_lost([index for index in range(self.count) if index not in live])
            time.sleep(POLL_INTERVAL)

    def mark_lost(self, indices: list[int]) -> None:
        """Record the loss of processes that left no exit notice."""
        for index in indices:
            process = f"process {index} of {self.count}"
            if index == 0:
                process += f", the coordinator ({self.config.coordinator}),"
            self.record_exit(index, ExitNotice(UnavailableError.exit_code, f"{process} was lost; {RERUN_HINT}"))

    def record_exit(self, index: int, notice: ExitNotice) -> None:
        """Record the exit of a process; abort if this process needs it."""
        with self._lock:
            if index == self.index or index in self.gone:
                return
            self.gone[index] = notice
        if notice.code and not self.process_local_depth and self.leaving is None:
            self.abort(notice)

    def first_failure(self) -> ExitNotice | None:
        """Return the notice of the first process that failed or was lost."""
        return next((notice for notice in list(self.gone.values()) if notice.code), None)

    def abort(self, notice: ExitNotice) -> NoReturn:
        """End this process, even if other threads wait."""
        try:
            self.announce_exit(notice)
        finally:
            self.exit_now(notice)

    def exit_now(self, notice: ExitNotice) -> NoReturn:
        """Print the message and end this process without waiting for its threads."""
        if notice.message:
            print(f"{self.program}: error: {notice.message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(notice.code)

    def shutdown(self, notice: ExitNotice) -> None:
        """Leave the group."""
        import jax

        self.announce_exit(notice)
        if self.index == 0 or self.is_coordinator_alive():
            jax.distributed.shutdown()

    def announce_exit(self, notice: ExitNotice) -> None:
        """Publish an exit notice; process 0 waits for those of its peers."""
        import jax

        self.leaving = notice
        if self.client is None or (self.index and not self.is_coordinator_alive()):
            return
        deadline = time.monotonic() + (SHUTDOWN_TIMEOUT if notice.code else BARRIER_TIMEOUT)
        try:
            self.client.key_value_set(f"{_EXIT_NOTICES}/{self.index}", json.dumps(notice), allow_overwrite=True)
            while self.index == 0 and time.monotonic() < deadline:
                left = {int(key.rpartition("/")[2]) for key, _ in self.client.key_value_dir_get(_EXIT_NOTICES)}
                if len(left | self.gone.keys() | {0}) == self.count:
                    return
                time.sleep(0.05)
        except jax.errors.JaxRuntimeError:
            if self.index == 0:
                raise  # another process ignores it: process 0 left meanwhile, and its service with it

    def is_coordinator_alive(self) -> bool:
        """Return True if the port of process 0 accepts connections."""
        try:
            socket.create_connection(host_and_port(self.config.coordinator), timeout=2).close()
        except OSError:
            return False
        return True

    def diagnose(self, error: Exception) -> ExitNotice | None:
        """Return the exit notice of the process behind an error, if any.

        An error in a collective may precede the missed heartbeat, so that this waits for the heartbeat timeout.
        """
        import jax

        text = str(error)
        is_suspect = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in text
        deadline = time.monotonic() + (self.config.heartbeat_timeout + 15 if is_suspect or "Gloo" in text else 0)
        while (notice := self.first_failure()) is None and time.monotonic() <= deadline:
            time.sleep(0.05)
        return notice


_group: PeerGroup | None = None


def current() -> PeerGroup | None:
    """Return the group of this process; None: a single process."""
    return _group


def connect(config: DistributedConfig, program: str) -> PeerGroup:
    """Connect to the other processes; errors as `distributed_context`."""
    global _group
    _group = group = PeerGroup(config, program)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # this module reports the loss of peers
    import jax

    if group.index == 0:
        _require_free_port(config.coordinator)
    else:
        _await_coordinator(group)
    jax.config.update("jax_enable_recoverability", True)
    _install_sigabrt_handler()
    jax.distributed.initialize(
        config.coordinator,
        config.num_processes,
        config.process_id,
        local_device_ids=local_device_ids(),
        cluster_detection_method="deactivate",
        initialization_timeout=config.initialization_timeout,
        heartbeat_timeout_seconds=config.heartbeat_timeout,
    )
    group.client = client()
    threading.Thread(target=group.run_monitor, name="peers", daemon=True).start()
    jax.local_devices()  # initializes the devices of all processes together
    return group


def _require_free_port(coordinator: str) -> None:
    if "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return
    _, port = host_and_port(coordinator)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise InputError(
                f"--coordinator {coordinator}: process 0 cannot listen on this port ({error.strerror}); choose another"
            ) from error


def _await_coordinator(group: PeerGroup) -> None:
    """Wait until process 0 listens; JAX would call abort() after its timeout."""
    coordinator, limit = group.config.coordinator, group.config.initialization_timeout
    deadline = time.monotonic() + limit
    while not group.is_coordinator_alive():
        if time.monotonic() > deadline:
            try:
                socket.getaddrinfo(*host_and_port(coordinator))
            except OSError as error:
                raise InputError(f"--coordinator {coordinator}: no such host ({error.strerror})") from error
            raise UnavailableError(
                f"--coordinator {coordinator}: process 0 did not answer within {limit} s; is it running there?"
            )
        time.sleep(0.2)


def client() -> Any:
    """Return the client of JAX's coordination service."""
    from jax._src import distributed

    if distributed.global_state.client is None:
        raise InputError("several processes must call jax.distributed.initialize() first, as the command line does")
    return distributed.global_state.client


def _install_sigabrt_handler() -> None:
    libc().signal(signal.SIGABRT, ctypes.cast(_on_abort, ctypes.c_void_p))


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
    """Handle abort() on the thread that called it; returning continues the abort."""
    group = _group
    is_python_thread = threading.get_ident() in {thread.ident for thread in threading.enumerate()}
    if group is not None and group.leaving is not None:
        if not is_python_thread and group.leaving.message:
            time.sleep(SHUTDOWN_TIMEOUT)  # the leaving thread prints its message and ends the process
        group.exit_now(group.leaving)
    if group is not None and group.client is None:
        group.abort(
            ExitNotice(
                UnavailableError.exit_code,
                f"--coordinator {group.config.coordinator}: not all of {group.count} processes arrived within "
                f"{group.config.initialization_timeout} s; start the missing ones and this one again",
            )
        )
    if group is not None and not is_python_thread and group.index and not group.is_coordinator_alive():
        group.mark_lost([0])
        threading.Event().wait()  # blocks JAX's thread; the others continue
    libc().signal(signal.SIGABRT, signal.SIG_DFL)
