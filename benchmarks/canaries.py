"""Write canaries, with known numbers of copies, and text for a continued pre-training that contains them.

    JAX_SELFTRAIN_DATA=… python benchmarks/canaries.py TOKENIZER OUT

A canary is a document of random words that no other text contains; the model can only know it from the training text,
where it has 1, 2, 4, … 64 copies. Each has a twin: words drawn in the same way that are in no text.

| file | content |
|---|---|
| `pretraining.jsonl` | all copies of the canaries and as many tokens of fairy tales, shuffled |
| `sequences.npy`, `copies.npy` | the first 64 tokens of each canary and twin [2N, 64]; copies, 0 for twins [2N] |
| `unseen.npy` | 64 tokens of fairy tales outside all files [N, 64] |
| `real.jsonl`, `heldout.jsonl` | other fairy tales: for an arm with real text; for bits per byte |

TOKENIZER is a folder with a tokenizer. The files are the same for the same seed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain.hub.tokenizer import read_tokenizer

WINDOW = 64
"""Tokens of a sequence: a prefix of 32 and a suffix of 32."""
COPIES = (1, 2, 4, 8, 16, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--per-count", type=int, default=8, help="canaries of each number of copies")
    parser.add_argument("--real-tokens", type=int, default=120_000, help="tokens of real.jsonl")
    parser.add_argument("--heldout-documents", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = read_tokenizer(args.tokenizer)
    rng = random.Random(args.seed)
    with (Path(os.environ["JAX_SELFTRAIN_DATA"]) / "fairytales/sections.jsonl").open() as file:
        documents = [json.loads(line)["text"] for line in file]
    rng.shuffle(documents)
    counts = Counter(word for text in documents for word in re.findall(r"\b[a-z]{3,}\b", text))
    words = sorted(word for word, _ in counts.most_common(3000))

    def draw_sequence() -> tuple[str, list[int]]:
        text = " ".join(rng.choice(words) for _ in range(WINDOW))
        text = text[0].upper() + text[1:] + "."
        return text, encode(tokenizer, text)[:WINDOW]

    copies = [count for count in COPIES for _ in range(args.per_count)]
    canaries = [draw_sequence() for _ in copies]
    twins = [draw_sequence() for _ in copies]
    planted = [text for (text, _), count in zip(canaries, copies, strict=True) for _ in range(count)]

    remaining = iter(documents)

    def take(tokens: int) -> list[str]:
        """Take documents until their total length reaches `tokens`."""
        taken: list[str] = []
        while tokens > 0:
            taken.append(next(remaining))
            tokens -= len(encode(tokenizer, taken[-1]))
        return taken

    mixed = [*planted, *take(sum(len(encode(tokenizer, text)) for text in planted))]
    rng.shuffle(mixed)
    real = take(args.real_tokens)
    heldout = [next(remaining) for _ in range(args.heldout_documents)]
    unseen = [ids[:WINDOW] for ids in (encode(tokenizer, text) for text in remaining) if len(ids) >= WINDOW]

    args.out.mkdir(parents=True, exist_ok=True)
    for name, texts in (("pretraining", mixed), ("real", real), ("heldout", heldout)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (args.out / f"{name}.jsonl").write_text(lines)
        print(f"{name}.jsonl: {len(texts):,} documents, {sum(len(encode(tokenizer, text)) for text in texts):,} tokens")
    arrays = {
        "sequences": [ids for _, ids in canaries + twins],
        "copies": copies + [0] * len(twins),
        "unseen": unseen[: len(copies)],
    }
    for name, rows in arrays.items():
        np.save(args.out / f"{name}.npy", np.asarray(rows, np.int32))


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


if __name__ == "__main__":
    main()
