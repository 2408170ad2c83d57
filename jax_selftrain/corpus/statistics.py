"""Statistics of a corpus, to compare corpora before training.

Shards are read in order, by batches of the needed columns; memory grows by 8 bytes a sample, for duplicates. Counts are
exact, floats are summed in sample order and hashes are standard, so the numbers do not depend on the machine. Undefined
numbers (n-grams longer than any sample, the log-probability of imported text) are NaN here and null in JSON.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow.compute as pc

from jax_selftrain.corpus.reader import Corpus, batch_tokens

DISTINCT_TOKENS = 1 << 18
"""Maximum number of tokens for distinct-n."""
RARE_FREQUENCY = 1e-4
"""Tokens of a lower relative frequency are rare."""

_DECIMALS = 6
_HASH_BYTES = 8  # of a billion samples, 0.03 pairs collide
_COMPARED_AT_ONCE = 1 << 16  # hashes


def corpus_statistics(corpus: Corpus, policy_logprobs: Iterable[float | None] = (None,)) -> dict[str, Any]:
    """Compute the `statistics` of `corpus.json`.

    Args:
        corpus: the corpus; its manifest needs `samples` and `shards`.
        policy_logprobs: of each shard, if sampled, the sum over samples of the log-probability under the sampling
            distribution, in nats.

    Returns:
        Plain data, floats rounded to 6 decimals:

        - length {mean, std, min, median, max}: tokens per sample, with the stop id; std divides by N.
        - stopped: share of samples that end with a stop id.
        - nll_per_token: −Σ logprob / Σ tokens in nats, under the source at temperature 1; null if any logprob is null.
        - entropy_per_token: −Σ policy_logprob / Σ tokens in nats; null if any shard has none. An unbiased estimate,
          since −log p of a sample is in expectation the entropy of its distribution.
        - distinct {tokens, 1, 2, 3, 4}: distinct n-grams / n-grams within samples (distinct-n, Li et al. 2016,
          arXiv:1510.03055). It falls with the size of a text, so it is computed on the first whole samples with at most
          2^18 tokens together; `tokens` is their number. Corpora with much fewer are not comparable.
        - duplicates: share of samples whose tokens equal those of an earlier sample.
    """
    samples = len(corpus)
    lengths: Counter[int] = Counter()
    hashes = np.empty(samples, np.uint64)
    head, head_lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]  # the first samples, for distinct-n
    stopped = row = 0
    free, logprob = DISTINCT_TOKENS, 0.0
    for batch in corpus.batches(["tokens", "logprob", "finish_reason"]):
        flat, batch_lengths = batch_tokens(batch)
        ends = np.cumsum(batch_lengths)
        fitting = int(np.searchsorted(ends, free, side="right"))
        if fitting:
            head.append(flat[: ends[fitting - 1]].copy())
            head_lengths.append(batch_lengths[:fitting])
        free = free - int(ends[-1]) if fitting == len(ends) else -1
        lengths.update(batch_lengths.tolist())
        hashes[row : row + len(ends)] = _hash_samples(flat, ends)
        row += len(ends)
        stopped += pc.equal(batch.column("finish_reason"), "stop").true_count
        logprob += math.fsum(batch.column("logprob").to_numpy(zero_copy_only=False).tolist())  # null is NaN
    tokens = sum(length * count for length, count in lengths.items())
    policy_logprob = math.fsum(math.nan if value is None else value for value in policy_logprobs)
    return _to_json(
        {
            "length": _length_statistics(lengths),
            "stopped": stopped / samples,
            "nll_per_token": _ratio(-logprob, tokens),
            "entropy_per_token": _ratio(-policy_logprob, tokens),
            "distinct": _distinct_ngrams(np.concatenate(head), np.concatenate(head_lengths)),
            "duplicates": _count_repeated(hashes) / samples,
        }
    )


def tail_statistics(corpus: Corpus, first: Corpus, n: int) -> dict[str, Any]:
    """Compute diversity and rare tokens of the first `n` tokens.

    These numbers depend on the size of a text, so they are computed on equally many tokens of every corpus.

    Args:
        corpus: a corpus of at least `n` tokens.
        first: corpus of at least 2·n tokens. Its tokens n … 2n define the rare tokens; in the tokens that define them,
            rare tokens would be rarer than in any other text.
        n: number of tokens.

    Returns:
        Plain data: distinct (see `corpus_statistics`; the last sample is cut), unigram_entropy (of the distribution of
        tokens, in nats, without a correction for the size), rare_mass (share of tokens that are rare).
    """
    flat, lengths = _read_range(corpus, 0, n)
    reference, _ = _read_range(first, n, 2 * n)
    size = 1 + int(max(flat.max(), reference.max()))
    counts, before = (np.bincount(tokens, minlength=size) for tokens in (flat, reference))
    shares = counts[counts > 0] / n
    return _to_json(
        {
            "distinct": _distinct_ngrams(flat, lengths),
            "unigram_entropy": -math.fsum((shares * np.log(shares)).tolist()),
            "rare_mass": int(counts[before < RARE_FREQUENCY * n].sum()) / n,
        }
    )


def _read_range(corpus: Corpus, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens `start` to `stop`, and the lengths of their samples."""
    tokens, ends, read = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)], 0
    for flat, lengths in corpus.token_batches():
        if read >= stop:
            break
        tokens.append(flat)
        ends.append(read + np.cumsum(lengths))
        read += len(flat)
    bounds = np.clip(np.concatenate(ends), start, stop) - start
    return np.concatenate(tokens)[start:stop], np.diff(np.concatenate([[0], bounds]))


def _length_statistics(lengths: Mapping[int, int]) -> dict[str, float]:
    """Return moments and quantiles of lengths given as {length: number of samples}."""
    ascending = sorted(lengths)
    up_to = np.cumsum([lengths[length] for length in ascending])
    n = int(up_to[-1])
    total = sum(length * count for length, count in lengths.items())
    squares = sum(length**2 * count for length, count in lengths.items())
    lower, upper = (ascending[i] for i in np.searchsorted(up_to, [(n - 1) // 2, n // 2], side="right"))
    return {
        "mean": total / n,
        "std": math.sqrt(n * squares - total**2) / n,  # integers up to the root, so there is no cancellation
        "min": ascending[0],
        "median": (lower + upper) / 2,
        "max": ascending[-1],
    }


def _distinct_ngrams(flat: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """Return the share of distinct n-grams among the n-grams within samples.

    Samples are concatenated in `flat`. The rank of an n-gram and the rank of the next token form the key of the
    (n+1)-gram (Karp, Miller & Rosenberg 1972), so the counts are exact and keys of any vocabulary fit 64 bits.
    """
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(flat))  # tokens up to the end of the sample
    words, word = np.unique(flat, return_inverse=True)
    found: dict[str, float] = {"tokens": len(flat)}
    gram = np.zeros(len(flat), np.int64)  # rank of the (n−1)-gram at each position; all empty grams are equal
    for n in (1, 2, 3, 4):
        positions = np.flatnonzero(left >= n)
        different, rank = np.unique(gram[positions] * len(words) + word[positions + n - 1], return_inverse=True)
        gram[positions] = rank
        found[str(n)] = _ratio(len(different), len(positions))
    return found


def _hash_samples(flat: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Hash the tokens (little-endian int32) of each sample by BLAKE2b; uint64 [N]."""
    data = flat.astype("<i4", copy=False).tobytes()
    bounds = [0, *(4 * ends).tolist()]
    digests = (hashlib.blake2b(data[a:b], digest_size=_HASH_BYTES).digest() for a, b in pairwise(bounds))
    return np.frombuffer(b"".join(digests), "<u8")


def _count_repeated(hashes: np.ndarray) -> int:
    """Count values that repeat an earlier one; sort them in place."""
    hashes.sort()
    repeated = 0
    for first in range(0, len(hashes) - 1, _COMPARED_AT_ONCE):
        block = hashes[first : first + _COMPARED_AT_ONCE + 1]
        repeated += int(np.count_nonzero(block[1:] == block[:-1]))
    return repeated


def _ratio(numerator: float, denominator: int) -> float:
    return numerator / denominator if denominator else math.nan


def _to_json(value: Any) -> Any:
    """Round floats, turn −0 into 0 and NaN into None."""
    if isinstance(value, dict):
        return {key: _to_json(inner) for key, inner in value.items()}
    if not isinstance(value, float):
        return value
    return round(value, _DECIMALS) + 0.0 if math.isfinite(value) else None
