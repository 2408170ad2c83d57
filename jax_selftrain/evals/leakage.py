"""The `leakage` command: how much training text occurs verbatim in unconditional samples.

A sample leaks if it has at least `min_match` consecutive tokens of one training document (50 by convention: Carlini et
al. 2021, arXiv:2012.07805; Nasr et al. 2023, arXiv:2311.17035). Training text is tokenized with the corpus's tokenizer.

The samples are indexed in blocks, and the training text is streamed (`corpus.longest_overlaps`), so memory holds one
block and one piece of text. Text that must be tokenized first takes four bytes per token of temporary disk space.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jax_selftrain import hub
from jax_selftrain.config import LeakageConfig, yaml_io
from jax_selftrain.corpus import (
    Corpus,
    LazilyTokenized,
    RaggedTokens,
    TokenSource,
    longest_overlaps,
    memmap_tokens,
    open_corpus,
)
from jax_selftrain.errors import InputError
from jax_selftrain.evals.result_files import describe_mean, output_paths, write_results
from jax_selftrain.evals.sequence_files import load_npy
from jax_selftrain.io.jsonl import check_text
from jax_selftrain.io.manifest import sha256_file
from jax_selftrain.io.rows import read_rows
from jax_selftrain.stats.estimators import wilson_interval
from jax_selftrain.version import versions

_CHUNK = 1 << 24  # tokens


def measure_leakage(config: LeakageConfig) -> dict[str, Any]:
    """Measure leakage of a training text, and write the result.

    Writes `FILE.json`, `FILE.samples.parquet`, `FILE.config.yaml`, `FILE.timings.json`.

    Returns:
      The content of `FILE.json`: `samples`; `leaking_samples`; `leak_rate`, their share, with standard error and
      Wilson's 95 % interval; `tokens` of the samples, `covered_tokens` in matches of at least `min_match`, and
      `coverage`, their share; `longest` match; `texts` with `documents` and `tokens`; `fingerprints`, `versions`.

    Raises:
      InputError: an input that cannot be read, or a training text that cannot be tokenized as the corpus.
    """
    yaml_io.require(config)
    output_paths(config.out)
    started = time.monotonic()
    corpus = open_corpus(config.corpus)
    with tempfile.TemporaryDirectory() as folder:
        documents, text, text_fingerprint = _open_text(config, corpus, Path(folder))
        opened = time.monotonic()
        overlaps = longest_overlaps(corpus, documents, min_length=config.min_match)
    lengths = np.concatenate([lengths for _, lengths in corpus.token_batches()])
    is_leaking = overlaps.length >= config.min_match
    result: dict[str, Any] = {
        "corpus": config.corpus,
        "min_match": config.min_match,
        "samples": len(lengths),
        "leaking_samples": int(is_leaking.sum()),
        **describe_mean("leak_rate", is_leaking),
        "leak_rate_interval": wilson_interval(is_leaking),
        "tokens": int(lengths.sum()),
        "covered_tokens": int(overlaps.covered.sum()),
        "coverage": float(overlaps.covered.sum() / max(1, lengths.sum())),
        "longest": int(overlaps.length.max()),
        "texts": {"path": config.texts, **text},
        "fingerprints": {"corpus": corpus.fingerprint, "texts": text_fingerprint},
        "versions": versions(),
    }
    columns = {
        "sample_id": np.arange(len(lengths)),
        "tokens": lengths,
        "longest": overlaps.length,
        "start": overlaps.query_start,
        "document": overlaps.text_doc,
        "document_start": overlaps.text_start,
        "covered": overlaps.covered,
    }
    timings = {"open_seconds": opened - started, "search_seconds": time.monotonic() - opened}
    write_results(config.out, config, result, {"samples": pa.table(columns)}, timings)
    return result


def _open_text(config: LeakageConfig, corpus: Corpus, folder: Path) -> tuple[TokenSource, dict[str, int], str]:
    """Return the documents of a training text, their numbers, and a fingerprint."""
    path = Path(config.texts)
    if path.suffix == ".npy":
        documents, fingerprint = _open_array(path), sha256_file(path)
    elif path.is_dir():
        other = open_corpus(path)
        if other.manifest["tokenizer_fingerprint"] == corpus.manifest["tokenizer_fingerprint"]:
            return other, {"documents": len(other), "tokens": other.n_tokens}, other.fingerprint
        tokenized = LazilyTokenized(other.iter_texts, _load_tokenizer(config, corpus))
        documents, fingerprint = memmap_tokens(tokenized, folder), other.fingerprint
    elif path.is_file() or hub.parse_dataset_split(config.texts) is not None:
        files = tuple(hub.text_files(config.texts))
        tokenized = LazilyTokenized(lambda: _iter_texts(files, config.text_field), _load_tokenizer(config, corpus))
        documents, fingerprint = memmap_tokens(tokenized, folder), hub.hash_files(files)
    else:
        raise InputError(f"--texts {path}: no such file or folder")
    return documents, {"documents": len(documents.offsets) - 1, "tokens": len(documents.tokens)}, fingerprint


def _open_array(path: Path) -> RaggedTokens:
    array = load_npy(path)
    if array.ndim not in (1, 2) or not array.size:
        raise InputError(f"{path}: must be token ids [tokens] or [documents, tokens], not {list(array.shape)}")
    documents = RaggedTokens.from_list(array if array.ndim == 2 else array[None])
    for first in range(0, len(documents.tokens), _CHUNK):
        chunk = documents.tokens[first : first + _CHUNK]
        if int(chunk.min()) < 0 or int(chunk.max()) >= 2**31:
            raise InputError(f"{path}: holds a number that is no token id (below 0, or beyond 32 bits)")
    return documents


def _load_tokenizer(config: LeakageConfig, corpus: Corpus) -> Any:
    if not config.tokenizer:
        raise InputError(
            f"--texts {config.texts}: is not in the tokens of {config.corpus}; name a model that has the corpus's "
            "tokenizer with --tokenizer"
        )
    model = hub.open_model(config.tokenizer)
    if model.tokenizer_fingerprint != corpus.manifest["tokenizer_fingerprint"]:
        raise InputError(
            f"--tokenizer {config.tokenizer}: is not the tokenizer of {config.corpus}; name the model that it was "
            "sampled from or imported for"
        )
    return model.tokenizer


def _iter_texts(files: Sequence[Path], field: str) -> Iterator[str]:
    for where, row in chain.from_iterable(map(read_rows, files)):
        if field not in row:
            raise InputError(f"{where}: no text under {field!r}; name the right field with --text-field")
        yield check_text(row[field], where)
