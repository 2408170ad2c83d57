"""Peak memory of loading, sampling, training and scoring, compared with transformers, torch and lm-evaluation-harness.

    python benchmarks/memory.py MODEL [--rows 16] [--tokens 128]

MODEL is a folder in the format of transformers. Each job runs in a process of its own; the peak is its anonymous memory
(mapped files do not count) above that after the imports and, for ours, the tokenizer. Sampling draws ROWS samples of
TOKENS tokens; a step of training has ROWS rows of TOKENS tokens in fp32, with AdamW; scoring has ROWS × 10 texts of 100
words. Compilation counts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

JOBS = ("load", "sample", "train", "score")


def anonymous_bytes() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])


def texts(rows: int) -> list[tuple[str, str]]:
    rng = np.random.default_rng(0)
    words = [f"{a} {b}" for a in ("the", "a", "one") for b in ("cat", "dog", "house", "tree", "river", "book")]
    return [("", " ".join(rng.choice(words, 50))) for _ in range(10 * rows)]


def ours(job: str, args: argparse.Namespace) -> Callable[[], Any]:
    import jax
    from training import random_batch

    from jax_selftrain import hub
    from jax_selftrain.config import TrainConfig
    from jax_selftrain.distributed.mesh import mesh_context, xla_options
    from jax_selftrain.likelihood import loglikelihoods
    from jax_selftrain.likelihood.tokenize import encode_pairs, start_token
    from jax_selftrain.sampling import SamplingParams
    from jax_selftrain.sampling.counter_rng import per_sample_keys
    from jax_selftrain.sampling.decode import DecodeLoop, DecodeSpec
    from jax_selftrain.training import abstract_train_step
    from jax_selftrain.training.step import init_state

    jax.devices()
    source = hub.open_model(args.model)
    _ = source.special_tokens

    def run() -> Any:
        model = hub.load_model(source, "data=1")
        rules = model.sharding_rules
        if job == "load":
            jax.block_until_ready(model.params)
            return model
        if job == "sample":
            sampling_params = SamplingParams(start_ids=(0,), stop_ids=(), max_tokens=args.tokens)
            spec = DecodeSpec.from_model(model)
            loop = DecodeLoop(spec, sampling_params, model.params, num_slots=args.rows, queue_size=args.rows)
            return loop.generate(per_sample_keys(0, np.arange(args.rows)))
        if job == "score":
            return loglikelihoods(model, encode_pairs(model.tokenizer, start_token(model), texts(args.rows)))
        train = TrainConfig(model=str(args.model), batch_size=args.rows, seq_len=args.tokens, steps=9)
        function, (_, batch, _), donation = abstract_train_step(train, rules.mesh)
        step = jax.jit(function, donate_argnums=donation, compiler_options=xla_options())
        placed = random_batch(batch, model.config.vocab_size)
        with mesh_context(rules.mesh):
            state = init_state(train, model.config, rules, model.params)
            del model
            for _ in range(2):
                state, metrics = step(state, placed, np.float32(1e-4))
        return float(metrics["loss"])

    return run


def theirs(job: str, args: argparse.Namespace) -> Callable[[], Any]:
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    def run() -> Any:
        if job == "score":
            lm = HFLM(pretrained=str(args.model), dtype="float32", device="cpu", batch_size=args.rows)
            pairs = enumerate(texts(args.rows))
            return lm.loglikelihood([Instance("loglikelihood", {}, pair, index) for index, pair in pairs])
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        if job == "load":
            return [float(leaf.sum()) for leaf in model.parameters()]  # maps become memory when they are read
        if job == "sample":
            start = torch.zeros((args.rows, 1), dtype=torch.long)
            options: dict[str, Any] = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens}
            with torch.no_grad():
                return model.generate(start, do_sample=True, top_k=0, pad_token_id=0, **options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        tokens = torch.randint(0, model.config.vocab_size, (args.rows, args.tokens))
        for _ in range(2):
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return run


def measure(run: Callable[[], Any]) -> tuple[int, float]:
    """Return the peak of anonymous bytes above the present, and seconds."""
    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    done.set()
    thread.join()
    return max(peak, anonymous_bytes()) - before, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        program, job = args.job.split(":")
        peak, seconds = measure((ours if program == "ours" else theirs)(job, args))
        print(f"RESULT {peak} {seconds}")
        return

    weights = sum(file.stat().st_size for file in args.model.glob("*.safetensors"))
    print(f"{args.model.name}: {weights / 1e6:,.0f} MB of weights; {args.rows} rows of {args.tokens} tokens\n")
    print("| job | ours, MB | of the weights | theirs, MB | of the weights |\n|---|---|---|---|---|")
    for job in JOBS:
        cells = []
        for program in ("ours", "theirs"):
            command = [sys.executable, __file__, *sys.argv[1:], "--job", f"{program}:{job}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            peak = int(done.stdout.split("RESULT ")[1].split()[0])
            cells += [f"{peak / 1e6:,.0f}", f"{peak / weights:.2f}×"]
        print(f"| {job} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
