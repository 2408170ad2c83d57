"""Tokens per second of BOS-only sampling, ours beside transformers' `generate`, in one process and in turns.

    python benchmarks/sampling.py --model DIR [--rows 64] [--tokens 128] [--rounds 3]

Same weights, type (fp32), policy (temperature 1, no truncation, no stop id, so that both draw every token) and threads.
The two take turns, so that a machine whose speed drifts slows both; the median of the rounds is shown. Our time covers
the decode loop and the copy to the host; compilation and warm-up of either side are not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np


def ours(model_ref: str, rows: int, tokens: int):
    from jax_selftrain import load_model
    from jax_selftrain.sampling.decode import architecture_of, decode
    from jax_selftrain.sampling.policy import Policy
    from jax_selftrain.sampling.words import sample_keys

    model = load_model(model_ref, mesh="data=1")
    policy = Policy(
        start_id=model.special.start_id or 0, stop_ids=(), max_tokens=tokens, valid_ids=model.config.vocab_size
    )
    keys = sample_keys(0, np.arange(rows))
    return lambda: decode(architecture_of(model), policy, model.params, keys, np.ones(rows, bool))


def theirs(model_ref: str, rows: int, tokens: int):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_ref, dtype=torch.float32)
    start = torch.full((rows, 1), model.config.bos_token_id)
    wanted = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": True, "temperature": 1.0, "top_k": 0}

    def run() -> None:
        with torch.no_grad():
            model.generate(start, attention_mask=torch.ones_like(start), pad_token_id=0, **wanted)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    given = (options.model, options.rows, options.tokens)
    contestants = {"jax_selftrain": ours(*given), "transformers": theirs(*given)}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(options.rounds + 1):  # the first round compiles and warms up
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    speed = {name: options.rows * options.tokens / statistics.median(times) for name, times in seconds.items()}
    for name, value in speed.items():
        print(f"{name:<16}{value:>12,.0f} tokens/s")
    print(f"{'ratio':<16}{speed['jax_selftrain'] / speed['transformers']:>12.2f}")


if __name__ == "__main__":
    main()
