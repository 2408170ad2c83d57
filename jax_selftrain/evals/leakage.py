"""Unconditional leakage: how much of a training text stands in what a model says without being asked.

A sample leaks if it holds at least `length` consecutive tokens that stand in one document of the training text
(50 by convention: Carlini et al. 2021, arXiv:2012.07805; Nasr et al. 2023, arXiv:2311.17035). Tokens are those of the
corpus's tokenizer: a training text that comes as text, or in other tokens, is encoded by it as running text.

The samples are indexed in blocks and the training text streams by (`corpus.find_overlaps`), from Parquet shards or from
a memory-mapped file. Memory holds one block and one piece of the text, whatever their sizes; texts that have to be
encoded first take four bytes a token of temporary disk space.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jax_selftrain import hub
from jax_selftrain.config import LeakageConfig, yaml_io
from jax_selftrain.corpus import (
    Corpus,
    LazilyTokenized,
    Overlaps,
    RaggedTokens,
    TokenSource,
    longest_overlaps,
    memmap_tokens,
    open_corpus,
)
from jax_selftrain.errors import InputError
from jax_selftrain.evals.result_files import is_text, output_paths, write_results
from jax_selftrain.evals.sequences import load_npy
from jax_selftrain.io.jsonl import read_jsonl
from jax_selftrain.io.manifest import sha256_file
from jax_selftrain.stats.standard_errors import mean_and_stderr, wilson_interval
from jax_selftrain.version import versions

_CHUNK = 1 << 24  # tokens


@dataclass(frozen=True)
class _TrainingTokens:
    documents: TokenSource
    n: int
    tokens: int
    fingerprint: str


def leakage(config: LeakageConfig) -> dict[str, Any]:
    """How much of a training text stands in a corpus; write `FILE.json`, `FILE.samples.parquet`, config and timings.

    Returns:
      What stands in `FILE.json`: `samples`; `leaking`, the share of them that leak, with standard error and Wilson's
      95 % interval, and `leaks`, their number; `tokens` of the samples, `covered_tokens` that lie in runs of the
      training text of at least `length`, and `covered`, their share; `longest` run; `texts` with `documents` and
      `tokens`; `fingerprints`, `versions`.

    Raises:
      InputError: an input that cannot be read, or a training text that is not in the corpus's tokens and cannot be
        brought into them.
    """
    yaml_io.require(config)
    if config.min_match < 1:
        raise InputError(f"--length is {config.min_match}; it must be at least 1")
    output_paths(config.out)
    started = time.monotonic()
    corpus = open_corpus(config.corpus)
    with tempfile.TemporaryDirectory() as folder:
        text = _open_text(config, corpus, Path(folder))
        opened = time.monotonic()
        found = longest_overlaps(corpus, text.documents, min_length=config.min_match)
    lengths = np.concatenate([lengths for _, lengths in corpus.token_batches()])
    leaking = found.length >= config.min_match
    share, stderr = mean_and_stderr(leaking)
    result: dict[str, Any] = {
        "corpus": config.corpus,
        "length": config.min_match,
        "samples": len(lengths),
        "leaks": int(leaking.sum()),
        "leaking": share,
        "leaking_stderr": stderr,
        "leaking_interval": wilson_interval(leaking),
        "tokens": int(lengths.sum()),
        "covered_tokens": int(found.covered.sum()),
        "covered": float(found.covered.sum() / max(1, lengths.sum())),
        "longest": int(found.length.max()),
        "texts": {"from": config.texts, "documents": text.n, "tokens": text.tokens},
        "fingerprints": {"corpus": corpus.fingerprint, "texts": text.fingerprint},
        "versions": versions(),
    }
    timings = {"open_seconds": opened - started, "search_seconds": time.monotonic() - opened}
    write_results(config.out, config, result, _table(lengths, found), "samples", timings)
    return result


def _open_text(config: LeakageConfig, corpus: Corpus, folder: Path) -> _TrainingTokens:
    path = Path(config.texts)
    if path.suffix == ".npy":
        return _open_array(path)
    if path.is_dir():
        other = open_corpus(path)
        if other.manifest["tokenizer_fingerprint"] == corpus.manifest["tokenizer_fingerprint"]:
            return _TrainingTokens(other, len(other), other.n_tokens, other.fingerprint)
        encoded = LazilyTokenized(other.iter_texts, _tokenizer_of(config, corpus))
        return _memmap(encoded, folder, other.fingerprint)
    if not path.is_file():
        raise InputError(f"--texts {path}: no such file or folder")
    tokenizer = _tokenizer_of(config, corpus)
    return _memmap(LazilyTokenized(lambda: _texts(path, config.text_field), tokenizer), folder, sha256_file(path))


def _open_array(path: Path) -> _TrainingTokens:
    array = load_npy(path)
    if array.ndim not in (1, 2) or not array.size:
        raise InputError(f"{path}: must be token ids [tokens] or [documents, tokens], not {list(array.shape)}")
    documents = RaggedTokens.from_list(array if array.ndim == 2 else array[None])
    for first in range(0, len(documents.tokens), _CHUNK):
        part = documents.tokens[first : first + _CHUNK]
        if int(part.min()) < 0 or int(part.max()) >= 2**31:
            raise InputError(f"{path}: holds a number that is no token id (below 0, or beyond 32 bits)")
    return _TrainingTokens(documents, len(documents.offsets) - 1, len(documents.tokens), sha256_file(path))


def _memmap(encoded: LazilyTokenized, folder: Path, fingerprint: str) -> _TrainingTokens:
    documents = memmap_tokens(encoded, folder)
    return _TrainingTokens(documents, len(documents.offsets) - 1, len(documents.tokens), fingerprint)


def _tokenizer_of(config: LeakageConfig, corpus: Corpus) -> Any:
    if not config.tokenizer:
        raise InputError(
            f"--texts {config.texts}: is not in the tokens of {config.corpus}; name a model that has the corpus's "
            "tokenizer with --tokenizer"
        )
    if hub.open_model(config.tokenizer).tokenizer_fingerprint != corpus.manifest["tokenizer_fingerprint"]:
        raise InputError(
            f"--tokenizer {config.tokenizer}: is not the tokenizer of {config.corpus}; name the model that it was "
            "sampled from or imported for"
        )
    return hub.open_model(config.tokenizer).tokenizer


def _texts(path: Path, field: str) -> Iterator[str]:
    for where, row in read_jsonl(path):
        if not is_text(row.get(field)):
            raise InputError(f"{where}: no text under {field!r}; name the right field with --text-field")
        yield row[field]


def _table(lengths: np.ndarray, found: Overlaps) -> pa.Table:
    columns = {
        "sample_id": np.arange(len(lengths)),
        "tokens": lengths,
        "longest": found.length,
        "begin": found.query_start,
        "document": found.text_doc,
        "place": found.text_start,
        "covered": found.covered,
    }
    return pa.table({name: pa.array(values, pa.int64()) for name, values in columns.items()})
