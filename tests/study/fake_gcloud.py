"""Simulate `gcloud` in a folder and log every call.

The folder holds the queued resource. Each worker is a subfolder; `ssh` runs the command with it as HOME. A
request is granted after two `describe` calls. `fake_gcloud.py preempt` (not a command of gcloud) kills the commands on
the workers and deletes the workers.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

FOLDER = Path(os.environ["FAKE_GCLOUD"])
WORKERS = int(os.environ.get("FAKE_WORKERS", "1"))
STATES = ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")


def count_describe_calls() -> int | None:
    """Return the number of `describe` calls; −1: preempted; None: no resource."""
    path = FOLDER / "resource.json"
    return json.loads(path.read_text()) if path.exists() else None


def must_fail() -> bool:
    """Return True for the first `FAKE_FAULTS` calls, to simulate network errors."""
    path = FOLDER / "faults"
    failed = int(path.read_text()) if path.exists() else 0
    if failed >= int(os.environ.get("FAKE_FAULTS", "0")):
        return False
    path.write_text(str(failed + 1))
    return True


def main(args: list[str]) -> int:
    with (FOLDER / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(args) + "\n")
    flags = {name: value for name, _, value in (arg.partition("=") for arg in args if arg.startswith("--"))}
    positional = [arg for arg in args if not arg.startswith("--")]
    if args == ["preempt"]:
        return preempt()
    if positional[:2] == ["storage", "rsync"]:
        shutil.copytree(FOLDER / "bucket", positional[3], dirs_exist_ok=True)
        return 0
    assert positional[:2] == ["compute", "tpus"], args
    assert {"--project", "--zone"} <= flags.keys(), args
    verb = tuple(positional[2:4])
    if verb == ("queued-resources", "create"):
        assert count_describe_calls() is None, "the queued resource exists already"
        assert {"--node-id", "--accelerator-type", "--runtime-version"} <= flags.keys()
        (FOLDER / "resource.json").write_text("0")
        return 0
    if verb == ("queued-resources", "describe") and must_fail():
        print("no network", file=sys.stderr)
        return 1
    calls_before = count_describe_calls()
    if calls_before is None:
        print("NOT_FOUND", file=sys.stderr)
        return 1
    if verb == ("queued-resources", "describe"):
        state = "SUSPENDED" if calls_before < 0 else STATES[min(calls_before, 2)]
        if 0 <= calls_before < 2:
            (FOLDER / "resource.json").write_text(str(calls_before + 1))
        if state == "ACTIVE":
            for worker in range(WORKERS):
                (FOLDER / f"worker{worker}").mkdir(exist_ok=True)
        print(state)
        return 0
    if verb == ("queued-resources", "delete"):
        (FOLDER / "resource.json").unlink()
        return 0
    assert verb == ("tpu-vm", "ssh"), args
    if calls_before < 2:
        print("no such node", file=sys.stderr)
        return 1
    workers = range(WORKERS) if flags["--worker"] == "all" else [int(flags["--worker"])]
    completed = [
        subprocess.run(["bash", "-c", flags["--command"]], env={**os.environ, "HOME": str(FOLDER / f"worker{worker}")})
        for worker in workers
    ]
    return max(process.returncode for process in completed)


def preempt() -> int:
    for pid in FOLDER.glob("worker*/selftrain/pid"):
        with suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)
    for worker in FOLDER.glob("worker*"):
        shutil.rmtree(worker)
    (FOLDER / "resource.json").write_text("-1")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
