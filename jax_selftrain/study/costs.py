"""Time, throughput and machine of a study, as its stages recorded.

They are no part of `results.json`, which is the same on every machine.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

from jax_selftrain.io import json_files
from jax_selftrain.io.jsonl import read_log


def collect_costs(folder: Path) -> list[dict[str, Any]]:
    """Sum the time of the finished stages of a study by command.

    Returns records with `stage`, `runs`, `hours`, `chip_hours` (of all devices of the program); for training also the
    means of `tokens_per_second` and `mfu` (None on a device whose peak is unknown). The first record is the total.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((folder / "stages").glob("*.seconds.json")):
        stage = path.name.removesuffix(".seconds.json")
        record = json_files.read_json(path)
        hours, timings = record["seconds"] / 3600, read_log(folder / "stages" / stage / "timings.jsonl")
        speeds = {
            name: [line[name] for line in timings[1:] if name in line] for name in ("tokens_per_second", "mfu")
        }  # the first line includes compilation
        means = {name: fmean(values) for name, values in speeds.items() if values}
        found.setdefault(stage.rpartition("-")[0], []).append(
            {"hours": hours, "chip_hours": hours * record.get("devices", 1)} | means
        )
    records = [
        {
            "stage": command,
            "runs": len(stages),
            **{name: sum(one[name] for one in stages) for name in ("hours", "chip_hours")},
            **{
                name: fmean(values)
                for name in ("tokens_per_second", "mfu")
                if (values := [one[name] for one in stages if name in one])
            },
        }
        for command, stages in found.items()
    ]
    total = {name: sum(one[name] for one in records) for name in ("runs", "hours", "chip_hours")}
    return [{"stage": "all", **total}, *records] if records else []


def read_machine(folder: Path) -> dict[str, str]:
    """Return device, mesh and processes of the last training."""
    logs = [read_log(path) for path in sorted((folder / "stages").glob("train-*/launches.jsonl"))]
    launches = [log[-1] for log in logs if log]
    if not launches:
        return {}
    last = max(launches, key=lambda launch: float(launch["time"]))
    mesh = ", ".join(f"{name} {size}" for name, size in last["mesh"].items())
    return {"device": str(last["device"]), "mesh": mesh, "processes": str(last["processes"])}
