"""Start `jax-selftrain` commands in processes without importing JAX in each.

A fork server (`multiprocessing`) imports the package once per test process; each command is a fork of it. The fork sets
its environment, standard output and standard error, and runs `jax_selftrain.cli.main` or other code with its own
devices.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

import pytest

COMMAND = """
import sys
from jax_selftrain.cli import main
sys.exit(main())
"""

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["launcher_imports"])


class CommandProcess:
    """A command in its own process; the interface is part of `subprocess.Popen`."""

    def __init__(self, argv: Sequence[object], environment: Mapping[str, str], code: str = "") -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = tuple(Path(self._folder.name, name) for name in ("stdout", "stderr"))
        with pytest.MonkeyPatch.context() as patch:  # the server has the path of this process only by the environment
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            for name in [name for name in os.environ if name.startswith("JAX_")]:  # each process applies its own
                patch.delenv(name)
            forkserver.ensure_running()
        arguments = (list(map(str, argv)), dict(environment), textwrap.dedent(code), *self._files)
        self._process = _SERVER.Process(target=_run_command, args=arguments)
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has ended: the exit code tells
            if self.poll() is None:
                os.kill(self.pid, number)

    def dump_stacks(self) -> str:
        """Return standard error with the Python stacks of all threads, of a process that still runs."""
        self.send_signal(signal.SIGUSR2)
        with suppress(subprocess.TimeoutExpired):
            self.wait(1.0)
        return self._files[1].read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(["jax-selftrain"], timeout or 0.0)
        return self._process.exitcode

    def wait_until(self, condition: Callable[[], bool], seconds: float = 300.0) -> None:
        """Wait until the condition holds or the process has ended."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and not condition():
            assert time.monotonic() < deadline, "the condition was not met"
            time.sleep(0.002)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the process; return (standard output, standard error)."""
        self.wait(timeout)
        out, err = (path.read_text(encoding="utf-8", errors="replace") if path.exists() else "" for path in self._files)
        return out, err


def launch(*argv: object, **environment: str) -> CommandProcess:
    """Start `jax-selftrain ARGV` with additional environment variables."""
    return CommandProcess(argv, {**os.environ, **environment})


def launch_code(code: str, *argv: object, **environment: str) -> CommandProcess:
    """Start Python code with `sys.argv[1:]` = ARGV, as `python -c` does."""
    return CommandProcess(argv, {**os.environ, **environment}, code)


def run_command(*argv: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `jax-selftrain ARGV` and wait for it."""
    return _complete(launch(*argv, **environment))


def run_code(code: str, *argv: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code and wait for it."""
    return _complete(launch_code(code, *argv, **environment))


def _complete(process: CommandProcess) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate()
    return subprocess.CompletedProcess([], process.wait(), out, err)


def _run_command(argv: list[str], environment: dict[str, str], code: str, out: Path, err: Path) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for path, number in ((out, 1), (err, 2)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    faulthandler.register(signal.SIGUSR2)
    _apply_to_jax(environment)
    sys.argv = ["jax-selftrain", *argv]
    exec(code or COMMAND, {"__name__": "__main__"})


def _apply_to_jax(environment: Mapping[str, str]) -> None:
    """Set the options of JAX, which was imported without variables."""
    import jax

    options = jax.config.values
    for name, text in environment.items():
        option = name.lower()
        if option in options:
            kind = type(options[option])
            value = (
                text.lower() in ("1", "true", "yes") if kind is bool else kind(text) if kind in (int, float) else text
            )
            jax.config.update(option, value)
