"""A `gcloud` that keeps a queued resource and its workers in a folder, and writes down every call.

Workers are folders that serve as HOME; `ssh` runs the command there. A request is granted after two looks at it.
`fake_gcloud.py preempt` (not a command of gcloud's) kills what runs on the workers and takes them away.
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

PLACE = Path(os.environ["FAKE_GCLOUD"])
WORKERS = int(os.environ.get("FAKE_WORKERS", "1"))
GRANTED_AFTER = ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")


def looks() -> int | None:
    path = PLACE / "resource.json"
    return json.loads(path.read_text()) if path.exists() else None


def fault() -> bool:
    """Whether this call fails as without a network: the first `FAKE_FAULTS` that are made."""
    path = PLACE / "faults"
    made = int(path.read_text()) if path.exists() else 0
    if made >= int(os.environ.get("FAKE_FAULTS", "0")):
        return False
    path.write_text(str(made + 1))
    return True


def main(words: list[str]) -> int:
    with (PLACE / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(words) + "\n")
    flags = {name: value for name, _, value in (word.partition("=") for word in words if word.startswith("--"))}
    plain = [word for word in words if not word.startswith("--")]
    if words == ["preempt"]:
        return preempt()
    if plain[:2] == ["storage", "rsync"]:
        shutil.copytree(PLACE / "bucket", plain[3], dirs_exist_ok=True)
        return 0
    assert plain[:2] == ["compute", "tpus"], words
    assert {"--project", "--zone"} <= flags.keys(), words
    verb = tuple(plain[2:4])
    if verb == ("queued-resources", "create"):
        assert looks() is None, "there is one already"
        assert {"--node-id", "--accelerator-type", "--runtime-version"} <= flags.keys()
        (PLACE / "resource.json").write_text("0")
        return 0
    if verb == ("queued-resources", "describe") and fault():
        print("no network", file=sys.stderr)
        return 1
    found = looks()
    if found is None:
        print("NOT_FOUND", file=sys.stderr)
        return 1
    if verb == ("queued-resources", "describe"):
        state = "SUSPENDED" if found < 0 else GRANTED_AFTER[min(found, 2)]
        if 0 <= found < 2:
            (PLACE / "resource.json").write_text(str(found + 1))
        if state == "ACTIVE":
            for worker in range(WORKERS):
                (PLACE / f"worker{worker}").mkdir(exist_ok=True)
        print(state)
        return 0
    if verb == ("queued-resources", "delete"):
        (PLACE / "resource.json").unlink()
        return 0
    assert verb == ("tpu-vm", "ssh"), words
    if found < 2:
        print("no such node", file=sys.stderr)
        return 1
    chosen = range(WORKERS) if flags["--worker"] == "all" else [int(flags["--worker"])]
    codes = [
        subprocess.run(["bash", "-c", flags["--command"]], env={**os.environ, "HOME": str(PLACE / f"worker{worker}")})
        for worker in chosen
    ]
    return max(code.returncode for code in codes)


def preempt() -> int:
    for pid in PLACE.glob("worker*/selftrain/pid"):
        with suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)
    for worker in PLACE.glob("worker*"):
        shutil.rmtree(worker)
    (PLACE / "resource.json").write_text("-1")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
