"""Which process this is, and whether another one still lives.

A process is identified by host, boot, PID namespace, PID and start time, since PIDs repeat (in containers they nearly
always do).
"""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class ProcessId:
    host: str
    """For people."""
    scope: str
    """Hash of host, boot and PID namespace: within one scope, PID and start time name a process for good."""
    pid: int
    start_time: int
    """Clock ticks from boot to the start of the process; 0 where the system does not tell."""


def this_process() -> ProcessId:
    pid = os.getpid()  # not cached: a fork is another process
    state = _proc_stat(pid)
    return ProcessId(platform.node(), boot_and_pid_namespace(), pid, state[1] if state else 0)


@cache
def boot_and_pid_namespace() -> str:
    """A name for this host since its last start, and PID namespace: within it a process is named by PID and start."""
    parts = [platform.node()]
    boot = Path("/proc/sys/kernel/random/boot_id")
    if boot.exists():
        parts += [boot.read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _proc_stat(pid: int) -> tuple[str, int] | None:
    """(state letter, start time in ticks since boot) from Linux's /proc, or None."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()  # the name before it may hold spaces and parentheses
    return fields[0], int(fields[19])


def is_alive(process: ProcessId) -> bool | None:
    """Whether a process still runs; None if it lives in another scope and cannot be asked."""
    if process.scope != boot_and_pid_namespace():
        return None
    if Path("/proc/self/stat").exists():
        state = _proc_stat(process.pid)
        return state is not None and state[0] not in "ZX" and state[1] == process.start_time
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
