"""Kill a study at random times, finish it and compare the output.

    python benchmarks/killed_study.py OUT -- demo --study
    python benchmarks/killed_study.py OUT -- demo                      # one model, minutes

The arguments after `--` are a command of jax-selftrain without `--out`. The script runs the command to its end in
`OUT/uninterrupted`. In `OUT/killed` it kills the command (SIGKILL) at ten random times and finishes it with two
processes. `results.json`, the report, all tables and all figures must be equal byte for byte. The script prints the
times and the stages at each kill; it exits with 1 if a file differs or a lease is left.
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
"""Relative path of the study in both folders; the results contain it."""


def start(folder: Path, command: list[str]) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    root = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "jax_selftrain", *command, "--out", STUDY],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
    )


def wait(*processes: subprocess.Popen[bytes]) -> None:
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"exit codes: {codes}")


def leased_stages(study: Path) -> str:
    """Return the names of the stages with a lease."""
    held = [path.name.removeprefix(".").removesuffix(".lease") for path in study.glob("*/.*.lease")]
    return ", ".join(sorted(held)) or "between stages"


def output_files(study: Path) -> Iterator[tuple[str, bytes]]:
    for pattern in ("results.json", "report.html", "tables/*", "figures/*", "claims.json"):
        for path in sorted(study.glob(pattern)):
            yield str(path.relative_to(study)), path.read_bytes()


def main() -> None:
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="random seed of the times")
    parser.add_argument("--seconds", type=float, help="duration of an uninterrupted run, if it has finished before")
    options = parser.parse_args(argv[:split])
    command = argv[split + 1 :] or ["demo", "--study"]

    uninterrupted, killed = options.out / "uninterrupted", options.out / "killed"
    began = time.monotonic()
    wait(start(uninterrupted, command))
    seconds = options.seconds or time.monotonic() - began
    print(f"uninterrupted: {seconds:.0f} s on {os.cpu_count()} cores, jax {jax.__version__}", flush=True)

    rng, kills = random.Random(options.seed), 0
    began = time.monotonic()
    for number in range(options.kills):
        process = start(killed, command)
        time.sleep(rng.uniform(0.3, 1.7) * seconds / (options.kills + 1))
        if process.poll() is None:
            stages = leased_stages(killed / STUDY)
            process.kill()
            kills += 1
            print(f"kill {number + 1} at {time.monotonic() - began:.0f} s: {stages}", flush=True)
        process.wait()
    wait(*(start(killed, command) for _ in range(2)))
    print(f"{kills} kills, then two processes: {time.monotonic() - began:.0f} s in total")

    leases = [str(path) for path in killed.rglob("*") if path.name.endswith(".lease")]
    expected, actual = (dict(output_files(folder / STUDY)) for folder in (uninterrupted, killed))
    different = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
    print(f"{len(expected)} files compared; different: {', '.join(different) or 'none'}; leases left: {len(leases)}")
    sys.exit(bool(different or leases or not expected))


if __name__ == "__main__":
    main()
