"""Identity of a process, and a check whether it is alive.

Host, boot, PID namespace, PID and start time identify a process, because PIDs repeat, in containers nearly always.
"""

import hashlib
import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class ProcessId:
    """A process of any machine."""

    host: str
    """Name of the machine, for messages."""
    scope: str
    """Hash of host, boot and PID namespace. PID and start time are unique within a scope."""
    pid: int
    start_time: int
    """Clock ticks from boot to the start of the process; 0 if the system does not report it."""


def this_process() -> ProcessId:
    """Return the identity of this process."""
    pid = os.getpid()  # not cached: a fork is another process
    return ProcessId(platform.node(), boot_and_pid_namespace(), pid, _start_time(pid) or 0)


@cache
def boot_and_pid_namespace() -> str:
    """Return a hash of host, boot and PID namespace."""
    parts = [platform.node()]
    boot = Path("/proc/sys/kernel/random/boot_id")
    if boot.exists():
        parts += [boot.read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _start_time(pid: int) -> int | None:
    """Return the start time of a live process in /proc, or None."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()  # the command name may hold spaces and parentheses
    return None if fields[0] in "ZX" else int(fields[19])


def is_alive(process: ProcessId) -> bool | None:
    """Return True if a process runs, None if unknown (another scope)."""
    if process.scope != boot_and_pid_namespace():
        return None
    if Path("/proc/self/stat").exists():
        return _start_time(process.pid) == process.start_time
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # a process of another user
    return True
