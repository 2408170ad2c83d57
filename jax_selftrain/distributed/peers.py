"""The group of processes that this one belongs to: how they meet, who is still there, and how a loss ends them."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from jax_selftrain.distributed.cluster import DistributedConfig, host_and_port, local_device_ids
from jax_selftrain.distributed.signals import libc
from jax_selftrain.errors import InputError, Preempted, SelftrainError, UnavailableError

BARRIER_TIMEOUT = 3600.0
"""How long processes wait for one that lives but does not come."""
SHUTDOWN_TIMEOUT = 15.0
"""How long process 0, which the others hang on, waits for them when it ends by an error."""
POLL_INTERVAL = 1.0
"""How often each asks who is still there."""

RERUN_HINT = "what was finished stays, run the same command again to go on"
_DEPARTURES = "jax_selftrain/departures"


@dataclass(frozen=True)
class ExitNotice:
    """How a process ended: exit code and sentence."""

    code: int
    message: str

    def error(self) -> SelftrainError:
        kinds = {kind.exit_code: kind for kind in (SelftrainError, InputError, Preempted)}
        return kinds.get(self.code, UnavailableError)(self.message)


class PeerGroup:
    """This process and its peers, from their meeting until this one leaves."""

    def __init__(self, config: DistributedConfig, program: str):
        self.config, self.program = config, program
        self.coordinator = config.coordinator
        self.index, self.count = config.process_id or 0, config.num_processes or 1
        self.client: Any = None
        """Of the coordination service; None: not connected yet."""
        self.gone: dict[int, ExitNotice] = {}
        self.process_local_depth = 0
        """How many times `on_its_own` has been entered."""
        self.leaving: ExitNotice | None = None
        """How this process ends, once it has nothing more to do with the others."""
        self._lock = threading.Lock()

    def start_monitor(self) -> None:
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
                    self.mark_lost([0])
                    return
                present, notes = range(self.count), []
            for key, note in notes:
                self.record_exit(int(key.rpartition("/")[2]), ExitNotice(**json.loads(note)))
            self.mark_lost([index for index in range(self.count) if index not in present])
            time.sleep(POLL_INTERVAL)

    def mark_lost(self, indices: list[int]) -> None:
        """Take note that these are there no more, unless they said good-bye."""
        for index in indices:
            who = f"process {index} of {self.count}"
            if index == 0:
                who += f", which the others meet at ({self.coordinator}),"
            self.record_exit(index, ExitNotice(UnavailableError.exit_code, f"{who} was lost; {RERUN_HINT}"))

    def record_exit(self, index: int, departure: ExitNotice) -> None:
        """Take note of how a process ended, and end with it if it is needed."""
        with self._lock:
            if index == self.index or index in self.gone:
                return
            self.gone[index] = departure
        if departure.code and not self.process_local_depth and self.leaving is None:
            self.abort(departure)

    def check_alive(self) -> None:
        """Raise how the first one ended that ended otherwise than well."""
        for departure in self.gone.values():
            if departure.code:
                raise departure.error()

    def abort(self, departure: ExitNotice) -> NoReturn:
        """End this process, whatever its other threads are waiting for."""
        try:
            self.announce_exit(departure)
        finally:
            self.exit_now(departure)

    def exit_now(self, departure: ExitNotice) -> NoReturn:
        """End this process with the sentence of its departure, behind whatever JAX says of the loss."""
        if departure.message:
            print(f"{self.program}: error: {departure.message}", file=sys.stderr)
        exit_now(departure.code)

    def shutdown(self, code: int, said: str = "") -> None:
        """End what this process has to do with the others."""
        import jax

        self.announce_exit(ExitNotice(code, said))
        if self.index == 0 or self.coordinator_answers():
            jax.distributed.shutdown()

    def announce_exit(self, departure: ExitNotice) -> None:
        """Tell the others how this process ends. Process 0 waits for theirs, since they hang on it."""
        import jax

        self.leaving = departure
        if self.client is None or (self.index and not self.coordinator_answers()):
            return
        deadline = time.monotonic() + (SHUTDOWN_TIMEOUT if departure.code else BARRIER_TIMEOUT)
        try:
            note = json.dumps(asdict(departure))
            self.client.key_value_set(f"{_DEPARTURES}/{self.index}", note, allow_overwrite=True)
            while self.index == 0 and time.monotonic() < deadline:
                said = {int(key.rpartition("/")[2]) for key, _ in self.client.key_value_dir_get(_DEPARTURES)}
                if len(said | self.gone.keys() | {0}) == self.count:
                    return
                time.sleep(0.05)
        except jax.errors.JaxRuntimeError:
            if self.index == 0:
                raise
            # Process 0 has gone meanwhile, and with it the only place where this could be told.

    def coordinator_answers(self) -> bool:
        """Whether somebody listens where process 0 should."""
        host, port = host_and_port(self.coordinator)
        try:
            socket.create_connection((host, port), timeout=2).close()
        except OSError:
            return False
        return True

    def diagnose(self, error: Exception) -> ExitNotice | None:
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


_group: PeerGroup | None = None


def current() -> PeerGroup | None:
    """The group of this process; None: it is alone."""
    return _group


def connect(config: DistributedConfig, program: str) -> PeerGroup:
    """Meet the others.

    Raises:
      InputError, UnavailableError: see `together`.
    """
    global _group
    _group = group = PeerGroup(config, program)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # what happens to peers is told here, in one sentence
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
    threading.Thread(target=group.start_monitor, name="peers", daemon=True).start()
    jax.local_devices()  # where devices start, all wait for all
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
    """Wait until process 0 listens: JAX would abort() when it does not come."""
    host, port = host_and_port(group.coordinator)
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


def client() -> Any:
    """Of JAX's coordination service."""
    from jax._src import distributed

    if distributed.global_state.client is None:
        raise InputError("several processes must call jax.distributed.initialize() first; the command line does so")
    return distributed.global_state.client


def exit_now(code: int) -> NoReturn:
    """End the process without waiting for any of its threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---------------------------------------------------------------- abort()


def _install_sigabrt_handler() -> None:
    libc().signal(signal.SIGABRT, ctypes.cast(_on_abort, ctypes.c_void_p))


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
    """Called on the thread that called abort(), which goes on with it if this returns."""
    group = _group
    ours = threading.get_ident() in {thread.ident for thread in threading.enumerate()}
    if group is not None and group.leaving is not None:
        if not ours and group.leaving.message:
            time.sleep(SHUTDOWN_TIMEOUT)  # the thread that leaves says the sentence, and ends the process before this
        group.exit_now(group.leaving)
    if group is not None and group.client is None:
        group.abort(
            ExitNotice(
                UnavailableError.exit_code,
                f"--coordinator {group.coordinator}: not all of {group.count} processes came within "
                f"{group.config.initialization_timeout} s; start the missing ones, and this one again",
            )
        )
    if group is not None and not ours and group.index and not group.coordinator_answers():
        group.mark_lost([0])
        threading.Event().wait()  # this thread of JAX's has nothing left to do, the others go on
    libc().signal(signal.SIGABRT, signal.SIG_DFL)
