"""Memory and time of every Pythia model on TPU slices.

    python benchmarks/pods.py OUT.json                    # compiles rows missing in OUT.json; needs libtpu, not a TPU
    python benchmarks/pods.py OUT.json --sizes pythia-1b --topologies v5e:4x4 --stages train

Settings are those of `configs/pythia-*.yaml`: bfloat16 operands, 1,024 tokens, 32 rows per replica in sampling, 64 rows
a step in training with `--remat full`. Where a replica does not fit on a chip, the model axis is widened (1, 2, 4
within a host for sampling and scoring; for training micro-batches are made smaller first); the first setting that fits
is reported. Prints the tables of docs/pods.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jax_selftrain.config import PlanConfig, SampleConfig, ScoreConfig, TrainConfig
from jax_selftrain.errors import InputError
from jax_selftrain.planning import PYTHIA_SHAPES, plan_memory
from jax_selftrain.planning.hardware import GIB, parse_topology

TOPOLOGIES = ("v5e:2x2", "v5e:4x4", "v5e:8x8", "v4:2x2x4", "v6e:4x4")
STAGES = ("sample", "train", "score")
ROWS, TOKENS, ROWS_A_STEP = 32, 1024, 64
SCORED = 10_000_000
"""Tokens to score, for the chip-hours."""


def settings(size: str, topology: str, stage: str) -> Iterator[PlanConfig]:
    """Yield settings from the fastest to the smallest in memory."""
    machine = parse_topology(topology)
    common = PlanConfig(model=size, topology=(topology,), stage=(stage,), score_tokens=SCORED)
    chips = machine.chips if stage == "train" else machine.chips_per_host
    for model in (1, 2, 4):
        data = chips // model
        mesh = f"data={data},model={model}"
        if stage == "sample":
            sample = SampleConfig(samples=16384, max_tokens=TOKENS, batch_size=ROWS, dtype="bfloat16", mesh=mesh)
            yield replace(common, sample=sample)
        elif stage == "score":
            yield replace(common, score=ScoreConfig(dtype="bfloat16", mesh=mesh))
        else:
            train = TrainConfig(
                batch_size=ROWS_A_STEP, seq_len=TOKENS, steps=256, dtype="bfloat16", remat="full", mesh=mesh
            )
            for accumulated in (1, 4, 16):
                if ROWS_A_STEP % (accumulated * data) == 0:
                    yield replace(common, train=replace(train, grad_accum=accumulated))


def first_that_fits(size: str, topology: str, stage: str) -> dict[str, Any]:
    row: dict[str, Any] = {"stage": stage, "topology": topology, "fits": False, "too_large": "no legal mesh"}
    for config in settings(size, topology, stage):
        try:
            (estimate,) = plan_memory(replace(config, compile=False))["rows"]
        except InputError:
            continue  # this model axis does not divide the model's heads
        if estimate["memory"]["arguments"] > estimate["memory"]["hbm"]:
            row = estimate
            continue
        (row,) = plan_memory(config)["rows"]
        if stage == "train":
            row["bytes_received_by_formula"] = sum_received(estimate)
        if row["fits"]:
            break
    return row


def sum_received(row: dict[str, Any]) -> float:
    """Return the bytes that each chip receives in one execution."""
    return sum(one["bytes_received"] for one in row["collectives"])


def find_equal_hosts(rows: dict[str, dict[str, Any]], size: str, topology: str, stage: str) -> dict[str, Any] | None:
    """Return the row of another slice with equal hosts.

    Sampling and scoring run the same program on each host.
    """
    machine = parse_topology(topology)
    for other in TOPOLOGIES if stage != "train" else ():
        known, row = parse_topology(other), rows.get(f"{size} {other} {stage}")
        if row is not None and (known.chip, known.chips_per_host) == (machine.chip, machine.chips_per_host):
            speed, meshes = row.get("tokens_per_second"), row.get("num_meshes")
            more = machine.chips / known.chips
            scaled = {} if speed is None else {"tokens_per_second": speed * more, "num_meshes": round(meshes * more)}
            return row | scaled | {"topology": topology, "chips": machine.chips}
    return None


def tables(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    sizes = [size for size in PYTHIA_SHAPES if any(key.startswith(f"{size} ") for key in rows)]
    for stage in STAGES:
        title = f"{stage}**: GiB in all on a chip; mesh; tokens/s at the roofline"
        yield from _table(title, TOPOLOGIES, sizes, lambda size, name, of=stage: _cell(rows.get(f"{size} {name} {of}")))
    title = "train, received by each chip in a step**: GB by the formula; compiled, as a multiple of it"
    yield from _table(title, TOPOLOGIES, sizes, lambda size, name: _received_cell(rows.get(f"{size} {name} train")))
    title = "The smallest of these slices that fits**"
    yield from _table(title, STAGES, sizes, lambda size, stage: _smallest(rows, size, stage))


def _table(title: str, columns: Sequence[str], sizes: Sequence[str], cell: Callable[[str, str], str]) -> Iterator[str]:
    """A row for each size."""
    yield f"\n**{title}\n"
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for size in sizes:
        yield f"| {size.removeprefix('pythia-')} | {' | '.join(cell(size, column) for column in columns)} |"


def _smallest(rows: dict[str, dict[str, Any]], size: str, stage: str) -> str:
    known = {name: row for name in TOPOLOGIES if (row := rows.get(f"{size} {name} {stage}"))}
    fitting = [name for name, row in known.items() if row["fits"]]
    nothing = "none" if len(known) == len(TOPOLOGIES) else ""
    return min(fitting, key=lambda name: parse_topology(name).chips, default=nothing)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if not row["fits"]:
        return "—"
    mesh = "×".join(str(size) for size in row["mesh"].values())
    micro = row["options"].get("grad_accum", 1)
    shape = mesh + (f", {micro} micro-batches" if micro > 1 else "")
    return f"{row['memory']['total'] / GIB:.1f}; {shape}; {row['tokens_per_second']:,.0f}"


def _received_cell(row: dict[str, Any] | None) -> str:
    if row is None or not row["fits"]:
        return "" if row is None else "—"
    formula = row["bytes_received_by_formula"]
    return f"{formula / 1e9:,.2f}; {sum_received(row) / formula:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sizes", nargs="*", default=list(PYTHIA_SHAPES))
    parser.add_argument("--topologies", nargs="*", default=list(TOPOLOGIES))
    parser.add_argument("--stages", nargs="*", default=list(STAGES))
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for stage in options.stages:
        for size in options.sizes:
            for topology in options.topologies:
                if (key := f"{size} {topology} {stage}") in rows:
                    continue
                began = time.perf_counter()
                rows[key] = find_equal_hosts(rows, size, topology, stage) or first_that_fits(size, topology, stage)
                options.out.write_text(json.dumps(rows, indent=1, sort_keys=True))
                print(f"{key}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    print("\n".join(tables(rows)))


if __name__ == "__main__":
    main()
