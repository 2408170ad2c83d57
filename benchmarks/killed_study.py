"""Kill a study at ten random moments, finish it with two processes at once, and compare it with an undisturbed one.

    python benchmarks/killed_study.py OUT -- demo --study
    python benchmarks/killed_study.py OUT -- demo                      # one model, minutes

What follows `--` is a command of jax-selftrain without `--out`. It runs once in `OUT/undisturbed`, and in
`OUT/killed`, where SIGKILL falls at random moments of a run that long. In the end `results.json`, the report, all
tables and all figures must be the same bytes. Prints where each kill fell, the seconds of the undisturbed run, and the
verdict; exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax

STUDY = "study"
"""The study's folder has the same relative name in both places: it stands in the results."""


def start(place: Path, command: list[str]) -> subprocess.Popen[bytes]:
    place.mkdir(parents=True, exist_ok=True)
    root = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "jax_selftrain", *command, "--out", STUDY],
        cwd=place,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
    )


def finish(*running: subprocess.Popen[bytes]) -> None:
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"a run ended with {codes}")


def at_work(study: Path) -> str:
    """The stages that somebody holds a lease on."""
    held = [path.name.removeprefix(".").removesuffix(".lease") for path in study.glob("*/.*.lease")]
    return ", ".join(sorted(held)) or "between stages"


def outcome(study: Path) -> Iterator[tuple[str, bytes]]:
    for pattern in ("results.json", "report.html", "tables/*", "figures/*", "claims.json"):
        for path in sorted(study.glob(pattern)):
            yield str(path.relative_to(study)), path.read_bytes()


def main() -> None:
    given = sys.argv[1:]
    split = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--seconds", type=float, help="of an undisturbed run, where that was finished before")
    options = parser.parse_args(given[:split])
    words = given[split + 1 :] or ["demo", "--study"]

    whole, killed = options.out / "undisturbed", options.out / "killed"
    began = time.monotonic()
    finish(start(whole, words))
    seconds = options.seconds or time.monotonic() - began
    print(f"undisturbed: {seconds:.0f} s on {os.cpu_count()} cores, jax {jax.__version__}", flush=True)

    moments, kills = random.Random(options.seed), 0
    began = time.monotonic()
    for number in range(options.kills):
        process = start(killed, words)
        time.sleep(moments.uniform(0.3, 1.7) * seconds / (options.kills + 1))
        if process.poll() is None:
            where = at_work(killed / STUDY)
            process.kill()
            kills += 1
            print(f"kill {number + 1} at {time.monotonic() - began:.0f} s: {where}", flush=True)
        process.wait()
    finish(*(start(killed, words) for _ in range(2)))
    print(f"{kills} kills, then two processes at once: {time.monotonic() - began:.0f} s in all")

    left = [str(path) for path in killed.rglob("*") if path.name.endswith(".lease")]
    one, other = (dict(outcome(place / STUDY)) for place in (whole, killed))
    differing = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    print(f"{len(one)} files compared; differing: {', '.join(differing) or 'none'}; leases left: {len(left)}")
    sys.exit(bool(differing or left or not one))


if __name__ == "__main__":
    main()
