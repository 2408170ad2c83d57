"""Windows over a document: each token scored once, compared with one forward pass for each window.

    python benchmarks/windows.py --model FOLDER --texts FILE.jsonl [--tokens 20000] [--rounds 3] [--out FILE.md]

The texts are joined to one document. All contestants measure the same windows of 50 tokens every 10 tokens:

* *blocks*: `window_metrics` with the model's positions as `max_prefix`: prefixes of 50 tokens to the longest.
* *blocks, prefix 50*: `window_metrics` with `max_prefix` 50, the published setting without shared prefixes.
* *batched* and *one by one*: `extraction_metrics` with a prefix of 50 tokens, or of the mean of *blocks*.

They alternate, so that a change of the machine's speed affects all. The first pass compiles and is not counted. *ratio*
is the time of a contestant divided by that of *blocks*, by round: median and range.
*difference* is the largest difference of log p_z from `extraction_metrics`, of windows with the same prefix.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measuring import CpuTime, describe_run, spend

from jax_selftrain import hub
from jax_selftrain.evals import extraction_metrics, load_texts
from jax_selftrain.evals.windows import SlidingWindows, TokenizedText, window_index, window_metrics
from jax_selftrain.likelihood.tokenize import encode_text

WINDOW, STRIDE, PREFIX = 50, 10, 50


def cut_windows(tokens: np.ndarray, begins: np.ndarray, prefix: int) -> np.ndarray:
    """Return windows with a prefix of one length, [N, prefix + WINDOW]."""
    return np.stack([tokens[begin - prefix : begin + WINDOW] for begin in begins[begins >= prefix]])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", required=True)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the table here too (Markdown)")
    options = parser.parse_args()
    model = hub.load_model(options.model, "data=1")
    (stories,) = load_texts([options.texts])
    tokens = np.array(encode_text(model.tokenizer, "\n".join(stories.documents), options.tokens)[0], np.int32)
    text = TokenizedText("stories", (tokens,))
    blocks = SlidingWindows(WINDOW, STRIDE, PREFIX, model.config.max_positions - WINDOW)
    fixed = SlidingWindows(WINDOW, STRIDE, PREFIX, PREFIX)
    index = window_index([text], blocks)
    begins, mean = index["begin"], round(float(index["prefix"].mean()))
    contestants: dict[str, Callable[[], Any]] = {
        "blocks": lambda: window_metrics(model, [text], blocks),
        f"blocks, prefix {PREFIX}": lambda: window_metrics(model, [text], fixed),
    }
    for prefix in (PREFIX, mean):
        rows = cut_windows(tokens, begins, prefix)
        measure = partial(extraction_metrics, model, rows, prefix, greedy_decode=False)
        contestants[f"batched, prefix {prefix}"] = measure
        contestants[f"one by one, prefix {prefix}"] = partial(measure, batch_tokens=1)
    found = {name: run()["logprob"] for name, run in contestants.items()}
    spent: dict[str, list[CpuTime]] = {name: [] for name in contestants}
    for _ in range(options.rounds):
        for name, run in contestants.items():
            spent[name].append(spend(run)[0])
    lines = ["| contestant | seconds | ratio | CPU seconds | ratio |", "|---|---|---|---|---|"]
    for name, times in spent.items():
        cells = [name]
        for what in ("wall", "user"):
            ratios = [getattr(a, what) / getattr(b, what) for a, b in zip(times, spent["blocks"], strict=True)]
            middle = statistics.median(getattr(one, what) for one in times)
            cells += [f"{middle:.2f}", f"{statistics.median(ratios):.1f} ({min(ratios):.1f}–{max(ratios):.1f})"]
        lines.append(f"| {' | '.join(cells)} |")
    shared, alone, batched = list(found.values())[:3]
    same = index["prefix"] == PREFIX
    difference = max(np.abs(alone - batched).max(), np.abs(shared - batched)[same].max())
    setting = (
        f"{Path(options.model).name}, float32, {len(tokens):,} tokens, {len(begins):,} windows of {WINDOW} every "
        f"{STRIDE}; prefixes of *blocks* {index['prefix'].min()}–{index['prefix'].max()}, mean {mean}"
    )
    text_out = "\n".join([describe_run(setting, options.rounds), *lines, "", f"difference: {difference:.1e}"]) + "\n"
    print(text_out)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("# Windows over a document\n\n" + text_out)


if __name__ == "__main__":
    main()
