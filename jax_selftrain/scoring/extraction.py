"""Extraction: does a model reproduce the suffix of a known sequence from its prefix?

Two numbers from one teacher-forced pass, since either alone misleads. *Exact match*: the greedy continuation of the
prefix is the suffix, which holds iff at every place of the suffix the most probable token, given the true tokens
before it, is the true one; no decoding is needed to know. *p_z*: the probability of the suffix under sampling at
temperature 1. A sequence is (n, p)-discoverable if n independent samples contain the suffix with probability at least
p, 1 − (1 − p_z)^n ≥ p (Hayes et al., arXiv:2410.19482). Greedy exact match also measures how fragile a path is: a
model can lose it to a little noise while the suffix stays almost as probable.

p_z is the probability of this one tokenisation of the text. Token rows are used exactly as they stand; no start token
is put before them.

Given the corpus that was trained on, sequences fall into classes by the longest run of consecutive tokens of their
*suffix* that occurs in one document: `held_out` (shorter than `overlap`), `seen` (all of it), `partial` (between).
What a model emits is what it memorised best, so this is a selected split: compare classes with care.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jax_selftrain import hub, settings, storage
from jax_selftrain.config import ExtractConfig
from jax_selftrain.corpus import NgramIndex, open_corpus
from jax_selftrain.errors import InputError
from jax_selftrain.sampling import greedy_continue
from jax_selftrain.scoring.files import result_files, write_results
from jax_selftrain.scoring.likelihood import batch_rows, token_scores
from jax_selftrain.scoring.metrics import mean_and_stderr, wilson_interval
from jax_selftrain.scoring.score import check_batch
from jax_selftrain.scoring.sequences import load_sequences

CLASSES = ("held_out", "partial", "seen")
TRIES = (1, 10, 100, 1_000, 10_000)
PROBABILITIES = (0.1, 0.5, 0.9)


def extract(config: ExtractConfig) -> dict[str, Any]:
    """Measure extraction; write `FILE.json`, `FILE.sequences.parquet`, `FILE.config.yaml`, `FILE.timings.json`.

    Returns:
      What stands in `FILE.json`: the summary of all sequences (see `summarise`); with a corpus, under `held_out`,
      `partial` and `seen`, those of its classes; `model`, `fingerprints`, `versions`.

    Raises:
      InputError: an input that cannot be read, or sequences that do not fit the model or the request; NaN.
    """
    settings.require(config, "model", "sequences", "out")
    check_batch(
        config.batch_tokens, prefix=config.prefix, suffix=config.suffix, overlap=config.overlap, limit=config.limit
    )
    result_files(config.out)
    started = time.monotonic()
    decoder, _ = hub.read_config(config.model)
    if config.prefix + config.suffix > decoder.max_positions:
        raise InputError(
            f"--prefix {config.prefix} + --suffix {config.suffix} is longer than the {decoder.max_positions} positions "
            f"of {config.model}; shorten one of them"
        )
    sequences = load_sequences(
        Path(config.sequences),
        config.prefix + config.suffix,
        vocab_size=decoder.vocab_size,
        limit=config.limit,
        tokenizer=lambda: hub.load_tokenizer(config.model),
    )
    fingerprints = {
        "model": hub.model_fingerprint(config.model),
        "tokenizer": hub.tokenizer_fingerprint(config.model),
        "sequences": storage.sha256_file(config.sequences),
    }
    overlaps = None
    if config.corpus:
        corpus = open_corpus(config.corpus, tokenizer_fingerprint=fingerprints["tokenizer"])
        fingerprints["corpus"] = corpus.fingerprint
        tokens, offsets, _ = corpus.token_arrays()
        overlaps = NgramIndex.build(tokens, offsets).longest_overlap(sequences[:, config.prefix :])
    model = hub.load_model(config.model, config.mesh, config.dtype, preset=config.preset)
    loaded = time.monotonic()
    measured = measure(model, sequences, config.prefix, batch_tokens=config.batch_tokens)
    result: dict[str, Any] = {
        "model": config.model,
        "prefix": config.prefix,
        "suffix": config.suffix,
        **summarise(measured, np.ones(len(sequences), bool)),
        "fingerprints": fingerprints,
        "versions": storage.versions(),
    }
    if overlaps is not None:
        classes = classify(overlaps, config.suffix, config.overlap)
        result |= {name: summarise(measured, classes == name) for name in CLASSES} | {"overlap": config.overlap}
        measured |= {"overlap": overlaps, "class": classes}
    timings = {"load_seconds": loaded - started, "score_seconds": time.monotonic() - loaded}
    write_results(config.out, config, result, _table(measured), "sequences", timings)
    return result


def measure(
    model: hub.LoadedModel, sequences: np.ndarray, prefix: int, *, batch_tokens: int = 8192
) -> dict[str, np.ndarray]:
    """Extraction of each of N sequences by a model in memory.

    Args:
      model: from `hub.load_model`.
      sequences: integer [N, prefix + suffix].
      prefix: tokens given; the rest is the suffix.
      batch_tokens: token positions in one device batch.

    Returns:
      Arrays [N]: `exact_match` (bool), `matched_tokens` (length of the longest common prefix of suffix and greedy
      continuation), `token_accuracy` (share of the suffix that the free-running greedy continuation has at its
      place), `teacher_forced_accuracy` (the same, each token predicted from the true ones), `logprob` (log p_z, nats).

    Raises:
      InputError: a log-probability is not a finite number.
    """
    forced = teacher_forced(model, sequences, prefix, batch_tokens=batch_tokens)
    exact, suffixes = forced["exact_match"], sequences[:, prefix:]
    # Where every teacher-forced argmax is right, the free-running continuation is the suffix: only the rest is decoded.
    free_running = suffixes.copy()
    rows = batch_rows(model.layout, sequences.shape[1], batch_tokens) // model.layout.data
    free_running[~exact] = greedy_continue(model, sequences[~exact, :prefix], suffixes.shape[1], batch_size=rows)
    return {
        "exact_match": exact,
        "matched_tokens": forced["matched_tokens"],
        "token_accuracy": (free_running == suffixes).mean(axis=1),
        "teacher_forced_accuracy": forced["teacher_forced_accuracy"],
        "logprob": forced["logprob"],
    }


def teacher_forced(
    model: hub.LoadedModel, sequences: np.ndarray, prefix: int, *, batch_tokens: int = 8192
) -> dict[str, np.ndarray]:
    """What one teacher-forced pass tells: all that `measure` returns but `token_accuracy`, which has to be decoded."""
    suffixes = sequences[:, prefix:]
    scores = token_scores(model, [(row[:prefix], row[prefix:]) for row in sequences], batch_tokens=batch_tokens)
    logprob = np.stack([answer.logprobs for answer in scores]).sum(axis=1, dtype=np.float64)
    if not np.isfinite(logprob).all():
        bad = int(np.flatnonzero(~np.isfinite(logprob))[0])
        raise InputError(
            f"the log-probability of sequence {bad} is {logprob[bad]}: the model's weights are damaged or overflow in "
            "this --dtype; check them, or try float32"
        )
    hits = np.stack([answer.greedy for answer in scores]) == suffixes
    exact = hits.all(axis=1)
    return {
        "exact_match": exact,
        "matched_tokens": np.where(exact, suffixes.shape[1], np.argmin(hits, axis=1)),
        "teacher_forced_accuracy": hits.mean(axis=1),
        "logprob": logprob,
    }


def classify(overlaps: np.ndarray, suffix: int, overlap: int) -> np.ndarray:
    """Class [N] of each sequence, from its longest overlap with the corpus in tokens: `held_out`, `partial`, `seen`."""
    return np.where(overlaps >= suffix, "seen", np.where(overlaps >= overlap, "partial", "held_out"))


def summarise(measured: dict[str, np.ndarray], members: np.ndarray) -> dict[str, Any]:
    """Means over the sequences in `members` (bool [N]) of what `measure` returned, with standard errors.

    Returns:
      `n`; `exact_match` with its Wilson 95 % interval; `token_accuracy`, `teacher_forced_accuracy`, `matched_tokens`,
      `logprob`; `discoverable` by "n@p". Standard errors are under `…_stderr`. All but `n` are None where n is 0.
    """
    n = int(members.sum())
    exact = measured["exact_match"][members]
    result: dict[str, Any] = {"n": n, "exact_match_interval": wilson_interval(exact) if n else None}
    for name in ("exact_match", "token_accuracy", "teacher_forced_accuracy", "matched_tokens", "logprob"):
        value, stderr = mean_and_stderr(measured[name][members]) if n else (None, None)
        result |= {name: value, f"{name}_stderr": stderr}
    found = discoverable(measured["logprob"][members])
    shares = {key: mean_and_stderr(flags) if n else (None, None) for key, flags in found.items()}
    result["discoverable"] = {key: value for key, (value, _) in shares.items()}
    result["discoverable_stderr"] = {key: stderr for key, (_, stderr) in shares.items()}
    return result


def discoverable(logprob: np.ndarray) -> dict[str, np.ndarray]:
    """Whether n samples at temperature 1 contain each suffix with probability ≥ p, as bool [N] by "n@p".

    1 − (1 − p_z)^n ≥ p is asked as n·log1p(−p_z) ≤ log1p(−p), which keeps its meaning for p_z far below the spacing
    of floating-point numbers near 1.
    """
    with np.errstate(divide="ignore"):  # p_z = 1 gives −inf, as it should
        log_miss = np.log1p(-np.exp(np.minimum(logprob, 0.0)))
    return {f"{n}@{p}": n * log_miss <= np.log1p(-p) for n in TRIES for p in PROBABILITIES}


def _table(measured: dict[str, np.ndarray]) -> pa.Table:
    types = {
        "exact_match": pa.bool_(),
        "matched_tokens": pa.int32(),
        "token_accuracy": pa.float64(),
        "teacher_forced_accuracy": pa.float64(),
        "logprob": pa.float64(),
        "overlap": pa.int32(),
        "class": pa.string(),
    }
    columns = {name: pa.array(values, types[name]) for name, values in measured.items()}
    index = pa.array(np.arange(len(measured["logprob"])), pa.int64())
    return pa.table({"sequence": index, **columns})
