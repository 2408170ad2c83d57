"""Perplexity of text files.

A document is scored as it would be sampled: start token, then its tokens, without an end token. (lm-evaluation-harness
lets Llama-like tokenizers add a second BOS and scores its prediction.) Special strings such as `</s>` in a text are
plain text. The document is the unit of standard errors, because tokens of one text are not independent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain.errors import InputError
from jax_selftrain.evals.item_results import ItemResults, item_hash
from jax_selftrain.evals.result_files import is_text, with_stderr
from jax_selftrain.io.jsonl import read_jsonl
from jax_selftrain.stats.standard_errors import exp_and_stderr, ratio_and_stderr


@dataclass(frozen=True)
class TextFile:
    """Documents of one JSONL file, named after it."""

    name: str
    path: Path
    documents: tuple[str, ...]


@dataclass(frozen=True)
class TokenizedText:
    """Scored part of a document."""

    tokens: tuple[int, ...]
    bytes: int
    """Number of UTF-8 bytes."""
    words: int
    """Number of pieces between white space, as in lm-evaluation-harness."""
    item_hash: str
    """Hash of the whole document."""


def load_texts(paths: Sequence[str], limit: int | None = None) -> list[TextFile]:
    """Read the `text` field of JSONL files, and skip blank texts.

    Raises:
      InputError: a file is missing or not JSONL, has a line without text, or has no texts.
    """
    files = []
    for path in map(Path, paths):
        documents = []
        for where, row in read_jsonl(path, limit):
            if not is_text(row.get("text")):
                raise InputError(f"{where}: no text under `text`")
            if row["text"].strip():
                documents.append(row["text"])
        if not documents:
            raise InputError(f"{path}: no texts in it")
        files.append(TextFile(path.name.removesuffix(".jsonl"), path, tuple(documents)))
    return files


def encode_text(tokenizer: Any, text: str, max_tokens: int | None = None) -> TokenizedText:
    """Tokenize a document without special tokens, and truncate it."""
    item = item_hash("", [text])
    encoding = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    tokens = encoding["input_ids"]
    if max_tokens is not None and len(tokens) > max_tokens:
        tokens = tokens[:max_tokens]
        text = text[: encoding["offset_mapping"][max_tokens - 1][1]]
    return TokenizedText(tuple(tokens), len(text.encode()), len(re.split(r"\s+", text)), item)


def perplexity_metrics(results: ItemResults, words: Sequence[int]) -> dict[str, Any]:
    """Compute negative log-likelihood and perplexities of a text file.

    Args:
      results: log-likelihood, tokens and bytes of each document.
      words: number of words of each document.

    Returns:
      `n` (documents), `tokens`, `bytes`, `words`; `nll` (nats per token), `perplexity` (per token), `word_perplexity`,
      `byte_perplexity`, `bits_per_byte`, each with its standard error `…_stderr`.
    """
    nll = -results.loglikelihood
    counts = {"tokens": results.tokens, "bytes": results.bytes, "words": np.asarray(words)}
    per_token, per_byte, per_word = (ratio_and_stderr(nll, count) for count in counts.values())
    bits = per_byte[0] / np.log(2), None if per_byte[1] is None else per_byte[1] / np.log(2)
    return {
        "n": results.count,
        **{unit: int(count.sum()) for unit, count in counts.items()},
        **with_stderr("nll", per_token),
        **with_stderr("perplexity", exp_and_stderr(*per_token)),
        **with_stderr("word_perplexity", exp_and_stderr(*per_word)),
        **with_stderr("byte_perplexity", exp_and_stderr(*per_byte)),
        **with_stderr("bits_per_byte", bits),
    }
