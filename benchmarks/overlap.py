"""Speed, memory and exactness of the overlap search.

A text of random tokens (Zipf, Pythia's vocabulary) is memory-mapped. Half of the queries are planted in it, each with
one run of exactly `--length` tokens, some across chunk boundaries. A quarter is planted with a run broken in its
middle; it and the rest must not be found. The time covers indexing the queries and streaming the text.

    python benchmarks/overlap.py --tokens 20000000
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from measuring import describe_run, peak_memory

from jax_selftrain.corpus import RaggedTokens, longest_overlaps, memmap_tokens
from jax_selftrain.corpus.overlap import CHUNK_TOKENS

VOCABULARY = 50_277
DOCUMENT = 500  # tokens; some documents are one and a half chunks long


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--tokens", type=int, default=20_000_000)
    options.add_argument("--queries", type=int, default=4000)
    options.add_argument("--length", type=int, default=50)
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    queries = np.random.default_rng(0).integers(0, VOCABULARY, (given.queries, given.length + 14)).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(1, get_context("spawn")) as elsewhere:  # keeps its memory out of the measurement
            offsets, wanted = elsewhere.submit(plant, queries, given.tokens, given.length, Path(folder)).result()
        text = RaggedTokens(np.memmap(Path(folder, "tokens.bin"), np.int32, "r"), offsets)
        print(describe_run(f"{given.tokens:,} tokens, {given.queries:,} queries of {queries.shape[1]}", given.rounds))
        print("| min_length | tokens/s | tokens per CPU second | planted | found | false | peak memory | before |")
        print("|---|---|---|---|---|---|---|---|")
        for shortest in (given.length, 32, 16, 8):
            before, seconds, busy = peak_memory(), [], time.process_time()
            for _ in range(given.rounds):
                began = time.perf_counter()
                found = longest_overlaps(RaggedTokens.from_list(queries), text, min_length=shortest)
                seconds.append(time.perf_counter() - began)
            busy = (time.process_time() - busy) / given.rounds
            hits = found.length >= given.length
            exact = (found.length == given.length) & (found.query_start == 7) & wanted
            speed = f"{given.tokens / np.median(seconds):,.0f} | {given.tokens / busy:,.0f}"
            print(
                f"| {shortest} | {speed} | {wanted.sum()} | {exact.sum()} | "
                f"{(hits & ~wanted).sum()} | {peak_memory():,.0f} MiB | {before:,.0f} MiB |"
            )


def plant(queries: np.ndarray, tokens: int, length: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write the text; return offsets and a mask of planted queries."""
    rng = np.random.default_rng(1)
    flat = (rng.zipf(1.2, tokens) % VOCABULARY).astype(np.int32)
    long = 3 * CHUNK_TOKENS // 2
    ends = np.append(np.arange(long, tokens // 2, long), np.arange(tokens // 2, tokens, DOCUMENT))
    offsets = np.unique(np.concatenate([[0], ends, [tokens]]))
    wanted = np.arange(len(queries)) < len(queries) // 2
    near_misses = np.arange(len(queries)) >= len(queries) * 3 // 4
    positions = np.sort(
        rng.choice((tokens - 2 * length) // (2 * length), wanted.sum() + near_misses.sum(), replace=False)
    )
    positions = rng.permutation(positions * 2 * length)
    for position, row in zip(positions.tolist(), np.flatnonzero(wanted | near_misses).tolist(), strict=True):
        end = int(offsets[np.searchsorted(offsets, position, side="right")])
        position = min(position, end - length)  # within one document
        flat[position : position + length] = queries[row, 7 : 7 + length]
        if near_misses[row]:
            flat[position + length // 2] = (flat[position + length // 2] + 1) % VOCABULARY
    memmap_tokens(RaggedTokens(flat, offsets), folder)
    return offsets, wanted


if __name__ == "__main__":
    main()
