"""Sampling speed, compared with transformers' `generate` and the roofline.

    python benchmarks/sampling.py [--cases pythia-70m:32x256 gqa:32x256] [--dtype float32] [--rounds 3] [--out FILE.md]

A case is SHAPE:ROWSxTOKENS. Weights are random: speed does not depend on them. All contestants have the same shapes,
type, sampling parameters (temperature 1, no truncation, no stop id, so that every token is drawn), rows, tokens and
threads. They take turns, so that a machine whose speed drifts slows all of them. The table shows medians over the
rounds, of speeds and of each round's ratios (with their range). Compilation and warm-up are not counted; our time is
that of the decode loop and the copy to the host.

* *peer*: transformers' `generate` with its key/value cache; on an accelerator also with a static cache and
  `torch.compile`, if that works. Without torch the column is empty.
* *roofline*: on a CPU the bare chain of the same weight products, layer after layer, plus a read of the mean cache; on
  an accelerator the time to read weights and cache once at the measured bandwidth of a large copy.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads must not spin while it is our turn

import jax
import jax.numpy as jnp
import numpy as np
from measuring import Case, add_peers, alternate, compare_with_peers, describe_run
from shapes import SHAPES, write_config

from jax_selftrain import hub
from jax_selftrain.distributed.mesh import make_mesh, xla_options
from jax_selftrain.distributed.sharding import make_sharding_rules
from jax_selftrain.models import DecoderConfig, abstract_params, axis_sizes, init_params
from jax_selftrain.sampling import SamplingParams
from jax_selftrain.sampling.counter_rng import per_sample_keys
from jax_selftrain.sampling.decode import DecodeLoop, DecodeSpec

# ---------------------------------------------------------------- contestants


def ours(case: Case, config: DecoderConfig, dtype: str, cache_dtype: str | None) -> Callable[[], Any]:
    rules = make_sharding_rules("tensor", make_mesh("data=1,model=1"), axis_sizes(config))
    spec = DecodeSpec(config, rules, dtype, cache_dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), init_params(config, 0, rules))
    sampling_params = SamplingParams(start_ids=(0,), stop_ids=(), max_tokens=case.tokens)
    loop = DecodeLoop(spec, sampling_params, params, num_slots=case.rows, queue_size=case.rows)
    keys = per_sample_keys(0, np.arange(case.rows))
    return lambda: loop.generate(keys)


def theirs(case: Case, dtype: str, *, compiled: bool = False) -> Callable[[], Any]:
    """Return transformers' `generate`; raises ImportError without torch."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.from_pretrained(write_config(SHAPES[case.shape]))
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).to(device).eval()
    start = torch.full((case.rows, 1), config.bos_token_id, device=device)
    options: dict[str, Any] = {"max_new_tokens": case.tokens, "min_new_tokens": case.tokens}
    options |= {"do_sample": True, "temperature": 1.0, "top_k": 0, "pad_token_id": 0}
    if compiled:
        options["cache_implementation"] = "static"

    def run() -> None:
        with torch.no_grad():
            found = model.generate(start, attention_mask=torch.ones_like(start), **options)
        assert found.shape == (case.rows, 1 + case.tokens)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def mean_cache_bytes(case: Case, config: DecoderConfig, dtype: str) -> int:
    """Compute the mean bytes of keys and values per step."""
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
    return case.rows * per_token * (case.tokens + 1) // 2


def bare_chain(case: Case, config: DecoderConfig, dtype: str) -> Callable[[], Any]:
    """Return the weight products and cache reads of `tokens` steps."""
    width, inner, layers = config.hidden_size, config.num_heads * config.head_dim, config.num_layers
    key = jax.random.key(0)

    def weight(*shape: int) -> jax.Array:
        return 0.02 * jax.random.normal(key, shape, dtype)

    keys_width = config.num_kv_heads * config.head_dim
    weights = {
        "q": weight(layers, inner, width),
        "k": weight(layers, keys_width, width),
        "v": weight(layers, keys_width, width),
        "o": weight(layers, width, inner),
        "up": weight(layers, config.intermediate_size, width),
        "down": weight(layers, width, config.intermediate_size),
    }
    if config.gated_mlp:
        weights["gate"] = weight(layers, config.intermediate_size, width)
    head, x = weight(config.vocab_size, width), weight(width, case.rows)  # a column is a row of the batch
    read = mean_cache_bytes(case, config, dtype) // jnp.dtype(dtype).itemsize // 4096
    cache, vector = weight(max(read, 1), 4096), weight(4096)

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.dot(a, b, precision="highest")

    def layer(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        attention = dot(w["q"], x)
        attention = attention.at[:keys_width].add(dot(w["k"], x) + dot(w["v"], x))
        hidden = dot(w["up"], x)
        if "gate" in w:
            hidden = hidden * dot(w["gate"], x)
        return x + dot(w["o"], attention) + dot(w["down"], hidden), None

    def step(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
        x, vector = carry
        x, _ = jax.lax.scan(layer, x, weights)
        x = 0.01 * x + dot(head, x)[:width]
        return (x, vector + dot(cache, vector)[0]), None

    def chain(x: jax.Array, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.scan(step, (x, vector), length=case.tokens)[0]

    run = jax.jit(chain, compiler_options=xla_options())  # the same options as our loop
    return lambda: jax.block_until_ready(run(x, vector))


def copy_bandwidth() -> float:
    """Measure bytes per second, read and written, of scaling a large array."""
    large = jnp.ones((1 << 28,), jnp.float32)
    scale = jax.jit(lambda x: x * 1.0001)
    jax.block_until_ready(scale(large))
    start = time.perf_counter()
    for _ in range(10):
        out = scale(large)
    jax.block_until_ready(out)
    return 10 * 2 * large.nbytes / (time.perf_counter() - start)


# ---------------------------------------------------------------- measuring


def measure(case: Case, dtype: str, cache_dtype: str | None, rounds: int) -> dict[str, Any]:
    """Measure one row of the table."""
    config = hub.open_model(write_config(SHAPES[case.shape])).config
    on_cpu = jax.default_backend() == "cpu"
    contestants = {"ours": ours(case, config, dtype, cache_dtype)}
    if on_cpu:
        contestants["roofline"] = bare_chain(case, config, dtype)
    notes = add_peers(
        contestants, lambda compiled: theirs(case, dtype, compiled=compiled), [False] if on_cpu else [False, True]
    )
    seconds = alternate(contestants, rounds)
    if not on_cpu:
        sizes = [leaf.size for leaf in jax.tree.leaves(select_read_params(config))]
        moved = sum(sizes) * jnp.dtype(dtype).itemsize + mean_cache_bytes(case, config, cache_dtype or dtype)
        seconds["roofline"] = [case.tokens * moved / copy_bandwidth()] * rounds
    speed = {name: [case.rows * case.tokens / value for value in values] for name, values in seconds.items()}
    return {"case": case, "speed": speed, "notes": notes}


def select_read_params(config: DecoderConfig) -> Any:
    """Return the shapes of all weights but an untied embedding."""
    params = dict(abstract_params(config))
    if not config.tie_word_embeddings:
        del params["embed"]
    return params


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| shape | rows × tokens | ours, tokens/s | transformers | ratio | roofline | share of it |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        case, speed = row["case"], row["speed"]
        share = statistics.median(a / b for a, b in zip(speed["ours"], speed["roofline"], strict=True))
        lines.append(
            f"| {case.shape} | {case.rows} × {case.tokens} | {compare_with_peers(speed)} "
            f"| {statistics.median(speed['roofline']):,.0f} | {100 * share:.0f} % |"
        )
    notes = [note for row in rows for note in row["notes"]]
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def main() -> None:
    on_cpu = jax.default_backend() == "cpu"
    cases = ["pythia-70m:32x256", "pythia-70m:128x256", "gqa:32x256"]
    if not on_cpu:
        shapes = ("pythia-410m", "pythia-1b", "pythia-2.8b")
        cases = [f"{shape}:{rows}x512" for shape in shapes for rows in (64, 128, 256)]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=cases, metavar="SHAPE:ROWSxTOKENS")
    parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--cache-dtype", default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the table here too (Markdown)")
    options = parser.parse_args()
    given = (options.dtype, options.cache_dtype, options.rounds)
    rows = []
    for case in map(Case.parse, options.cases):
        rows.append(measure(case, *given))
        print(table(rows[-1:]), flush=True)
    cache = f", cache {options.cache_dtype}" if options.cache_dtype else ""
    text = describe_run(options.dtype + cache, options.rounds) + "\n" + table(rows)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("# BOS-only sampling\n\n" + text)


if __name__ == "__main__":
    main()
