"""Speed and memory of decontamination.

The corpus repeats documents with their sentences in random order, until it has `--tokens` tokens. The time covers
reading the corpus, finding word n-grams and writing the samples that remain.

    python benchmarks/decontamination.py MODEL --texts stories.jsonl --tasks blimp:a.jsonl lambada:b.jsonl
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from measuring import describe_run, peak_memory

from jax_selftrain.config import DecontaminateConfig, ImportCorpusConfig
from jax_selftrain.corpus import import_text, open_corpus
from jax_selftrain.evals import decontaminate, load_texts
from jax_selftrain.hub import open_model
from jax_selftrain.io.jsonl import write_jsonl


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("model", help="folder of the model whose tokenizer the corpus has")
    options.add_argument("--texts", nargs="+", required=True)
    options.add_argument("--tasks", nargs="+", required=True)
    options.add_argument("--tokens", type=int, default=20_000_000)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus")
        with ProcessPoolExecutor(1, get_context("spawn")) as elsewhere:  # keeps its memory out of the measurement
            elsewhere.submit(write_corpus, given.model, given.texts, given.tokens, corpus).result()
        tokens, before, began = open_corpus(corpus).n_tokens, peak_memory(), time.perf_counter()
        report = decontaminate(DecontaminateConfig(str(corpus), str(Path(folder, "out")), tasks=tuple(given.tasks)))
        seconds = time.perf_counter() - began
    print(describe_run(f"{tokens:,} tokens in {report['samples']:,} samples, {len(given.tasks)} tasks", 1))
    print("| seconds | tokens/s | samples removed | peak memory | before |")
    print("|---|---|---|---|---|")
    print(
        f"| {seconds:.1f} | {tokens / seconds:,.0f} | {report['removed']:,} | {peak_memory():,.0f} MiB | "
        f"{before:,.0f} MiB |"
    )


def write_corpus(model: str, texts: Sequence[str], tokens: int, out: Path) -> None:
    """Write a corpus of at least `tokens` tokens."""
    documents = [document for text in load_texts(texts) for document in text.documents]
    tokenizer = open_model(model).tokenizer
    lengths = [len(tokens) for tokens in tokenizer(documents, add_special_tokens=False)["input_ids"]]

    def shuffled() -> Iterator[dict[str, str]]:
        rng, written = random.Random(0), 0
        while written < tokens:
            for document, length in zip(documents, lengths, strict=True):
                sentences = document.split(". ")
                rng.shuffle(sentences)
                written += length
                yield {"text": ". ".join(sentences)}

    source = out.with_suffix(".jsonl")
    write_jsonl(source, shuffled())
    import_text(ImportCorpusConfig(source=str(source), model=model, out=str(out)))


if __name__ == "__main__":
    main()
