"""A training step compiled ahead of time for TPU topologies: memory per chip and collectives.

python benchmarks/training_on_tpu.py        (needs `pip install libtpu`, no TPU)
"""

from __future__ import annotations

import os

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}

import re
import time
from collections import Counter

import jax
from measuring import tpu_mesh
from shapes import SHAPES, folder_of

from jax_selftrain.config import Remat, TrainConfig
from jax_selftrain.training import program

CASES: list[tuple[str, str, int, int, int, int, int, Remat]] = [
    # shape, topology, data, model, rows per step, micro-batches, tokens per row, remat
    ("pythia-410m", "v5e:2x2", 4, 1, 16, 4, 2048, "full"),
    ("pythia-2.8b", "v5e:4x4", 16, 1, 64, 4, 2048, "full"),
    ("pythia-12b", "v5e:8x8", 64, 1, 64, 1, 2048, "full"),
]
COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")


def main() -> None:
    print("| shape | chips | rows × tokens a step | micro-batches | state, GiB a chip | temporaries | compiled in |")
    print("|---|---|---|---|---|---|---|")
    for shape, topology, data, model, rows, micro, tokens, remat in CASES:
        mesh = tpu_mesh(topology, data, model)
        config = TrainConfig(
            model=folder_of(SHAPES[shape]),
            batch_size=rows,
            grad_accum=micro,
            seq_len=tokens,
            dtype="bfloat16",
            remat=remat,
            preset="fsdp",
            steps=1000,
        )
        function, arguments, donation = program(config, mesh)
        began = time.perf_counter()
        with jax.set_mesh(mesh):
            compiled = jax.jit(function, donate_argnums=donation).lower(*arguments).compile()
        seconds, memory = time.perf_counter() - began, compiled.memory_analysis()
        assert memory is not None
        state, temporary = memory.argument_size_in_bytes / 2**30, memory.temp_size_in_bytes / 2**30
        print(
            f"| {shape} | {topology} | {rows} × {tokens} | {micro} | {state:.2f} | {temporary:.2f} | {seconds:.0f} s |",
            flush=True,
        )
        kinds = Counter(found[1] for line in compiled.as_text().splitlines() if (found := COLLECTIVE.search(line)))
        print(f"<!-- collectives in the text of the program: {dict(kinds)} -->", flush=True)


if __name__ == "__main__":
    main()
