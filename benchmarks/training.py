"""Benchmark a training step against transformers with torch, and a roofline.

    python benchmarks/training.py [--cases pythia-70m:8x512] [--dtype float32] [--remat none] [--rounds 3]

A case is SHAPE:ROWSxTOKENS. Weights and tokens are random: speed does not depend on them. Both train all weights with
AdamW (torch's fused one), global-norm clipping, float32 master weights, and every position a target. The programs
alternate, so that a drift of the machine's speed affects both. The table shows medians over the rounds of speeds and
of ratios, with their range. Compilation and warm-up do not count.

* *peer*: the loss of transformers' model (default attention), `backward`, `clip_grad_norm_`, `AdamW.step`. On an
  accelerator with `torch.autocast` for bfloat16, eager and with `torch.compile` if that works.
* *roofline*: the model FLOP/s (`training.flops`) divided by the FLOP/s of products of large square matrices in the same
  run; on an accelerator also by the peak of the device (MFU).
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
from jax_selftrain.config import TrainConfig
from jax_selftrain.distributed.mesh import make_mesh, mesh_context, xla_options
from jax_selftrain.distributed.sharding import make_sharding_rules
from jax_selftrain.models import DecoderConfig, axis_sizes, init_params
from jax_selftrain.training import abstract_train_step
from jax_selftrain.training.flops import measure_speed
from jax_selftrain.training.loss import Batch
from jax_selftrain.training.step import init_state


def train_config(case: Case, dtype: Any, remat: Any) -> TrainConfig:
    return TrainConfig(
        model=write_config(SHAPES[case.shape]),
        batch_size=case.rows,
        seq_len=case.tokens,
        steps=1000,
        dtype=dtype,
        remat=remat,
    )


def random_batch(like: Batch, vocab_size: int) -> Batch:
    """Return one document of random ids per row."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, like.tokens.shape, np.int32)
    ones = np.ones(like.segments.shape, np.int32)
    positions = np.broadcast_to(np.arange(ones.shape[-1], dtype=np.int32), ones.shape)
    arrays = Batch(tokens, ones, positions, ones.astype(np.float32))
    return jax.tree.map(lambda array, leaf: jax.device_put(array, leaf.sharding), arrays, like)


def ours(case: Case, config: DecoderConfig, dtype: str, remat: str) -> Callable[[], Any]:
    """A call trains one step."""
    mesh, train = make_mesh("data=1,model=1"), train_config(case, dtype, remat)
    rules = make_sharding_rules(train.preset, mesh, axis_sizes(config))
    function, (_, batch, _), donation = abstract_train_step(train, mesh)
    step = jax.jit(function, donate_argnums=donation, compiler_options=xla_options())
    placed = random_batch(batch, config.vocab_size)
    with mesh_context(mesh):
        state = init_state(train, config, rules, init_params(config, 0, rules))

    def run() -> None:
        nonlocal state
        with mesh_context(mesh):
            state, metrics = step(state, placed, np.float32(1e-4))
        assert np.isfinite(float(metrics["loss"]))

    return run


def theirs(case: Case, dtype: str, *, compiled: bool = False) -> Callable[[], Any]:
    """The same with transformers and torch; raises ImportError without torch."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.from_pretrained(write_config(SHAPES[case.shape]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    tokens = torch.randint(0, config.vocab_size, (case.rows, case.tokens + 1), device=device)
    forward = torch.compile(model) if compiled else model

    def run() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = forward(tokens[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert np.isfinite(loss.item())

    return run


def product_flops(dtype: str) -> float:
    """FLOP/s of large square products in one program."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size), dtype) / size

    def chain(a: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 4, lambda _, x: jnp.dot(x, a, precision="highest"), a)

    run = jax.jit(chain)
    jax.block_until_ready(run(a))
    best = 0.0
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready(run(a))
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - began))
    return best


def measure(case: Case, dtype: str, remat: str, rounds: int) -> str:
    """One row of the table."""
    config = hub.open_model(write_config(SHAPES[case.shape])).config
    contestants = {"ours": ours(case, config, dtype, remat)}
    on_cpu = jax.default_backend() == "cpu"
    notes = add_peers(
        contestants, lambda compiled: theirs(case, dtype, compiled=compiled), [False] if on_cpu else [False, True]
    )
    seconds = alternate(contestants, rounds)
    speed = {name: [case.rows * case.tokens / value for value in values] for name, values in seconds.items()}
    middle = statistics.median(speed["ours"])
    achieved = measure_speed(train_config(case, dtype, remat), config, make_mesh("data=1,model=1"), middle)
    flops, reached = achieved["flops_per_second"], product_flops(dtype)
    mfu = f"{100 * achieved['mfu']:.0f} %" if "mfu" in achieved else "—"
    row = (
        f"| {case.shape} | {case.rows} × {case.tokens} | {compare_with_peers(speed)} "
        f"| {flops / 1e12:.3g} | {reached / 1e12:.3g} | {100 * flops / reached:.0f} % | {mfu} |"
    )
    return "\n".join([row, *notes])


HEADER = (
    "| shape | rows × tokens | ours, tokens/s | transformers | ratio | model TFLOP/s | of products | share | MFU |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    on_cpu = jax.default_backend() == "cpu"
    cases = ["pythia-70m:8x512"]
    if not on_cpu:
        cases = [f"{shape}:{rows}x2048" for shape, rows in (("pythia-160m", 16), ("pythia-410m", 8), ("pythia-1b", 8))]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=cases, metavar="SHAPE:ROWSxTOKENS")
    parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--remat", default="none" if on_cpu else "dots")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the table here too (Markdown)")
    options = parser.parse_args()
    rows = []
    for case in map(Case.parse, options.cases):
        rows.append(measure(case, options.dtype, options.remat, options.rounds))
        print(HEADER, rows[-1], sep="\n", flush=True)
    setting = describe_run(f"{options.dtype}, remat {options.remat}", options.rounds)
    text = "\n".join([setting, HEADER, *rows]) + "\n"
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("# A training step\n\n" + text)


if __name__ == "__main__":
    main()
