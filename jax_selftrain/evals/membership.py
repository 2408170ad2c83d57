"""The `membership` command: membership inference from token records.

A score of a document separates training text (members) from other text of the same kind (nonmembers); a higher score
is a more likely member, always.

| score | of a document |
|---|---|
| loss | mean log-probability of its tokens (Yeom et al., arXiv:1709.01604) |
| zlib | its log-likelihood, divided by the bytes of its zlib-compressed text (Carlini et al., arXiv:2012.07805) |
| min_k | mean of the lowest k % of the log-probabilities (Shi et al., arXiv:2310.16789) |
| min_k_plus_plus | the same of (log p − mean) / std under the model at that position (Zhang et al., arXiv:2404.02936) |
| reference | mean log-probability minus that of a reference model (Carlini et al., arXiv:2012.07805) |

Sets that differ in topic, time or source are separated without any membership (Duan et al., arXiv:2402.07841).
"""

import time
import zlib
from typing import Any

import numpy as np
import pyarrow as pa

from jax_selftrain.config import MembershipConfig, yaml_io
from jax_selftrain.errors import InputError
from jax_selftrain.evals.result_files import output_paths, write_results
from jax_selftrain.evals.token_records import TokenRecords, check_same_tokens, load_records
from jax_selftrain.io.manifest import sha256_file
from jax_selftrain.stats.roc import roc_auc, stratified_bootstrap, tpr_at_low_fpr
from jax_selftrain.version import versions

SIDES = ("members", "nonmembers")


def measure_membership(config: MembershipConfig) -> dict[str, Any]:
    """Measure the separation of two sets of documents, and write the result.

    Writes `FILE.json`, `FILE.documents.parquet` (the scores of each document), `FILE.config.yaml`, `FILE.timings.json`.

    Returns:
      The content of `FILE.json`: `members` and `nonmembers` with `set`, `documents`, `tokens` and `empty` (documents
      without tokens, which have no score); `scores` by name, each with `auc` and `tpr_at_1pct_fpr` and their 95 %
      intervals under `…_interval` (None if a set has one document); `k`, `resamples`, `seed`, `fingerprints`,
      `versions`.

    Raises:
      InputError: a file that is no token records, a set that is missing or empty, or a reference with other tokens.
    """
    yaml_io.require(config)
    output_paths(config.out)
    started = time.monotonic()
    if config.members == config.nonmembers:
        raise InputError(f"--members and --nonmembers are both {config.members!r}; name two sets of the records")
    records = load_records(config.records)
    reference = load_records(config.reference) if config.reference else None
    fingerprints = {"records": sha256_file(records.path), **records.fingerprints}
    if reference is not None:
        fingerprints |= {"reference": sha256_file(reference.path), "reference_model": reference.fingerprints["model"]}
    result: dict[str, Any] = {"fingerprints": fingerprints, "versions": versions()}
    scores: list[dict[str, np.ndarray]] = []
    tables = []
    for side in SIDES:
        documents = records.select(getattr(config, side))
        other = reference and reference.select(getattr(config, side))
        if other is not None:
            check_same_tokens(documents, other)
        kept = documents.lengths > 0
        if not kept.any():
            raise InputError(f"{records.path}: no document of {getattr(config, side)!r} has a token; name another set")
        documents, other = documents.filter(kept), other and other.filter(kept)
        scores.append(score_membership(documents, config.k, other))
        result[side] = {
            "set": getattr(config, side),
            "documents": len(documents.lengths),
            "tokens": int(documents.lengths.sum()),
            "empty": int((~kept).sum()),
        }
        columns = {name: documents.table[name] for name in ("set", "document")}
        columns |= {"is_member": np.full(len(documents.lengths), side == "members"), "tokens": documents.lengths}
        tables.append(pa.table({**columns, **scores[-1]}))
    result["scores"] = {name: _measure_separation(config, *(one[name] for one in scores)) for name in scores[0]}
    options = ("records", "reference", "k", "resamples", "seed")
    result |= {name: getattr(config, name) for name in options}
    timings = {"seconds": time.monotonic() - started}
    write_results(config.out, config, result, {"documents": pa.concat_tables(tables)}, timings)
    return result


def score_membership(documents: TokenRecords, k: float, reference: TokenRecords | None = None) -> dict[str, np.ndarray]:
    """Return the scores [D] of D documents by name.

    Args:
      documents: with at least one token each.
      k: percentage of the tokens of `min_k` and `min_k_plus_plus`, rounded down, at least one token.
      reference: the same documents under a reference model.
    """
    logprobs = [one.astype(np.float64) for one in documents.arrays("logprob")]
    moments = zip(logprobs, documents.arrays("mean_logprob"), documents.arrays("std_logprob"), strict=True)
    # A deterministic prediction has no deviation; a finite score still ranks its misses last.
    smallest = float(np.finfo(np.float32).tiny)
    normalized = [(logprob - mean) / np.maximum(std, smallest) for logprob, mean, std in moments]
    sizes = np.array([len(zlib.compress(text.encode())) for text in documents.table["text"].to_pylist()])
    scores = {
        "loss": np.array([one.mean() for one in logprobs]),
        "zlib": np.array([one.sum() for one in logprobs]) / sizes,
        "min_k": np.array([_mean_of_lowest(one, k) for one in logprobs]),
        "min_k_plus_plus": np.array([_mean_of_lowest(one, k) for one in normalized]),
    }
    if reference is not None:
        means = np.array([one.astype(np.float64).mean() for one in reference.arrays("logprob")])
        scores["reference"] = scores["loss"] - means
    return scores


def _mean_of_lowest(values: np.ndarray, k: float) -> float:
    count = max(1, int(len(values) * k / 100))
    return float(np.sort(values)[:count].mean())


def _measure_separation(config: MembershipConfig, members: np.ndarray, nonmembers: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, statistic in (("auc", roc_auc), ("tpr_at_1pct_fpr", tpr_at_low_fpr)):
        options = {"resamples": config.resamples, "seed": config.seed}
        estimate = stratified_bootstrap(statistic, members, nonmembers, **options)
        interval = None if estimate.low is None else [estimate.low, estimate.high]
        found |= {name: estimate.value, f"{name}_interval": interval}
    return found
