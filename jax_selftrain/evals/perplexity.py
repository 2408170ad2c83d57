"""Perplexity of texts: how well a model predicts whole documents, from the start token on.

A document is scored as it would be sampled: start token, then its tokens, and no end token. (lm-evaluation-harness
instead lets Llama-like tokenizers add a second BOS and counts its prediction.) Special strings such as `</s>` in a
text are read as the plain text they are. Sums run over documents, and so do standard errors: tokens of one text are
not independent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain.errors import InputError
from jax_selftrain.evals.item_results import item_hash
from jax_selftrain.evals.result_files import is_text
from jax_selftrain.io.jsonl import read_jsonl
from jax_selftrain.likelihood.engine import Likelihood
from jax_selftrain.stats.standard_errors import exp_and_stderr, ratio_and_stderr


@dataclass(frozen=True)
class TextFile:
    """Documents of one JSONL file, named after it."""

    name: str
    path: Path
    documents: tuple[str, ...]


@dataclass(frozen=True)
class TokenizedText:
    """The part of a document that is scored."""

    tokens: tuple[int, ...]
    bytes: int
    """UTF-8 bytes of that part."""
    words: int
    """Pieces between white space, counted as lm-evaluation-harness does."""
    item_hash: str
    """Hash of the whole document."""


def load_texts(paths: Sequence[str], limit: int | None = None) -> list[TextFile]:
    """Read the `text` field of JSONL files; blank texts are left out.

    Raises:
      InputError: a file is missing or not JSONL, has a line without text, or holds no text at all.
    """
    return [_load(Path(path), limit) for path in paths]


def encode_text(tokenizer: Any, text: str, max_tokens: int | None = None) -> TokenizedText:
    """Token ids of a document without special tokens, cut after `max_tokens`."""
    item = item_hash("", [text])
    encoding = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    tokens = encoding["input_ids"]
    if max_tokens is not None and len(tokens) > max_tokens:
        tokens = tokens[:max_tokens]
        text = text[: encoding["offset_mapping"][max_tokens - 1][1]]
    return TokenizedText(tuple(tokens), len(text.encode()), len(re.split(r"\s+", text)), item)


def perplexity_metrics(documents: Sequence[TokenizedText], answers: Sequence[Sequence[Likelihood]]) -> dict[str, Any]:
    """Negative log-likelihood and perplexities of a text file, each with its document-level standard error.

    Args:
      documents: what was scored.
      answers: per document, the likelihoods of its windows.

    Returns:
      `n` (documents), `tokens`, `bytes`, `words`; `nll` (nats per token), `perplexity` (per token), `word_perplexity`,
      `byte_perplexity`, `bits_per_byte`.
    """
    nll = [-sum(window.loglikelihood for window in windows) for windows in answers]
    counts = {
        "tokens": [len(document.tokens) for document in documents],
        "bytes": [document.bytes for document in documents],
        "words": [document.words for document in documents],
    }
    per_token, per_byte, per_word = (ratio_and_stderr(nll, counts[unit]) for unit in ("tokens", "bytes", "words"))
    bits = per_byte[0] / np.log(2), None if per_byte[1] is None else per_byte[1] / np.log(2)
    estimates = {
        "nll": per_token,
        "perplexity": exp_and_stderr(*per_token),
        "word_perplexity": exp_and_stderr(*per_word),
        "byte_perplexity": exp_and_stderr(*per_byte),
        "bits_per_byte": bits,
    }
    result: dict[str, Any] = {"n": len(documents)} | {unit: sum(count) for unit, count in counts.items()}
    for name, (value, stderr) in estimates.items():
        result |= {name: value, f"{name}_stderr": stderr}
    return result


def _load(path: Path, limit: int | None) -> TextFile:
    documents = []
    for where, row in read_jsonl(path, limit):
        if not is_text(row.get("text")):
            raise InputError(f"{where}: no text under `text`")
        if row["text"].strip():
            documents.append(row["text"])
    if not documents:
        raise InputError(f"{path}: no texts in it")
    return TextFile(path.name.removesuffix(".jsonl"), path, tuple(documents))
