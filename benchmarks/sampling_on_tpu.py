"""The decode loop compiled ahead of time for TPU topologies: memory per chip, collectives and copies per step.

    python benchmarks/sampling_on_tpu.py        (needs `pip install libtpu`, no TPU)

Loops of the program are nested: pages (depth 1), steps (2), layers (3), settled blocks (4). What stands at depth d runs
once for each turn of all loops around it.
"""

from __future__ import annotations

import os

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}

import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AxisType

from jax_selftrain.config import SampleConfig
from jax_selftrain.sampling import program

CASES = [  # name, layers, width, heads, vocabulary, topology, data, model, rows per replica, length limit
    ("pythia-1b", 16, 2048, 8, 50304, "v5e:4x4", 16, 1, 64, 1024),
    ("pythia-12b", 36, 5120, 40, 50688, "v5e:8x8", 8, 8, 32, 1024),
]
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1}
COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")
COPY = re.compile(r"= (\w+)\[([\d,]+)\]\S* (?:copy|transpose)\(")


def compiled(layers: int, width: int, heads: int, vocabulary: int, topology: str, *rest: int) -> Any:
    data, model, rows, tokens = rest
    raw = {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "max_position_embeddings": 2048,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.make_mesh((data, model), ("data", "model"), devices=devices, axis_types=(AxisType.Explicit,) * 2)
    samples = 16 * rows * data
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        sizes = {"samples": samples, "samples_per_shard": samples, "max_tokens": tokens, "batch_size": rows}
        config = SampleConfig(model=folder, dtype="bfloat16", **sizes)
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
    for name, layers, width, heads, vocabulary, topology, *rest in CASES:
        program = compiled(layers, width, heads, vocabulary, topology, *rest)
        memory, depths = program.memory_analysis(), by_depth(program.as_text())
        data, model, rows, tokens = rest
        arguments, temporary = memory.argument_size_in_bytes / 2**30, memory.temp_size_in_bytes / 2**30
        print(f"{name} on {topology}, data={data} model={model}, {rows} rows per replica, {tokens} tokens, bf16:")
        print(f"  per chip {arguments:.2f} GiB weights, cache and samples + {temporary:.2f} GiB temporaries")
        for depth in sorted(depths):
            kinds = Counter(match[1] for line in depths[depth] if (match := COLLECTIVE.search(line)))
            sizes = [
                BYTES.get(match[1], 4) * product(match[2]) for line in depths[depth] if (match := COPY.search(line))
            ]
            largest = max(sizes, default=0) / 2**20
            print(f"  depth {depth}: collectives {dict(kinds) or 'none'}; largest copy {largest:.1f} MiB")


def product(dimensions: str) -> int:
    result = 1
    for dimension in dimensions.split(","):
        result *= int(dimension)
    return result


if __name__ == "__main__":
    main()
