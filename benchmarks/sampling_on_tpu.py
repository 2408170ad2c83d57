"""The decode loop compiled ahead of time for TPU topologies: memory per chip, collectives and copies per step.

    python benchmarks/sampling_on_tpu.py        (needs `pip install libtpu`, no TPU)

Loops of the program are nested: pages (depth 1), steps (2), layers (3), settled blocks (4). What stands at depth d runs
once for each turn of all loops around it.
"""

from __future__ import annotations

import os

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}

import math
import re
from collections import Counter
from typing import Any

import jax
from measuring import tpu_mesh
from shapes import SHAPES, folder_of

from jax_selftrain.config import SampleConfig
from jax_selftrain.sampling import program

CASES = [  # shape, topology, data, model, rows per replica, length limit
    ("pythia-1b", "v5e:4x4", 16, 1, 64, 1024),
    ("pythia-12b", "v5e:8x8", 8, 8, 32, 1024),
]
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1}
COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")
COPY = re.compile(r"= (\w+)\[([\d,]+)\]\S* (?:copy|transpose)\(")


def compiled(shape: str, topology: str, data: int, model: int, rows: int, tokens: int) -> Any:
    mesh = tpu_mesh(topology, data, model)
    samples = 16 * rows * data
    sizes = {"samples": samples, "samples_per_shard": samples, "max_tokens": tokens, "batch_size": rows}
    config = SampleConfig(model=folder_of(SHAPES[shape]), dtype="bfloat16", **sizes)
    function, arguments, donation = program(config, mesh)
    with jax.set_mesh(mesh):
        return jax.jit(function, donate_argnums=donation).lower(*arguments).compile()


def by_depth(text: str) -> dict[int, list[str]]:
    """The lines of a compiled program by the number of loops around them."""
    computations: dict[str, list[str]] = {}
    for line in text.splitlines():
        if heading := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*-> .*\{$", line):
            lines = computations.setdefault(heading[1], [])
        elif line.startswith(" "):
            lines.append(line)
    callers: dict[str, list[tuple[str, int]]] = {}
    for name, lines in computations.items():
        for line in lines:
            for role, callee in re.findall(r"(body|condition|calls|to_apply)=%?([\w.\-]+)", line):
                callers.setdefault(callee, []).append((name, int(role == "body")))

    def depth(name: str) -> int:
        return max((depth(caller) + more for caller, more in callers.get(name, [])), default=0)

    found: dict[int, list[str]] = {}
    for name, lines in computations.items():
        found.setdefault(depth(name), []).extend(lines)
    return found


def main() -> None:
    for shape, topology, data, model, rows, tokens in CASES:
        program = compiled(shape, topology, data, model, rows, tokens)
        memory, depths = program.memory_analysis(), by_depth(program.as_text())
        arguments, temporary = memory.argument_size_in_bytes / 2**30, memory.temp_size_in_bytes / 2**30
        print(f"{shape} on {topology}, data={data} model={model}, {rows} rows per replica, {tokens} tokens, bf16:")
        print(f"  per chip {arguments:.2f} GiB weights, cache and samples + {temporary:.2f} GiB temporaries")
        for depth in sorted(depths):
            kinds = Counter(match[1] for line in depths[depth] if (match := COLLECTIVE.search(line)))
            sizes = [
                BYTES.get(match[1], 4) * math.prod(map(int, match[2].split(",")))
                for line in depths[depth]
                if (match := COPY.search(line))
            ]
            largest = max(sizes, default=0) / 2**20
            print(f"  depth {depth}: collectives {dict(kinds) or 'none'}; largest copy {largest:.1f} MiB")


if __name__ == "__main__":
    main()
