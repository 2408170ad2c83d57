"""What a corpus is like, in a few numbers, so that corpora can be compared before anything is trained on them.

The shards are read in order, batch by batch and only the columns that are needed, so that memory does not grow with the
corpus but for 8 bytes a sample, by which duplicates are known. Counts are exact, floats are added in the order of the
samples, hashes are those of a published standard: the numbers are a function of the corpus, not of the machine. Inside,
a number that there is not (n-grams longer than any sample, the log-probability of text that nobody drew) is nan; in
JSON it is null.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jax_selftrain.io import atomic

DISTINCT_TOKENS = 1 << 18
"""Most tokens that distinct-n is measured on."""
DISTINCT_ORDERS = (1, 2, 3, 4)

_DECIMALS = 6
_BATCH_ROWS = 1024
_HASH_BYTES = 8  # two samples share a hash with probability 2^-64: of a billion, 0.03 would seem repeated and are not
_COMPARED_AT_ONCE = 1 << 16  # hashes


def corpus_statistics(folder: atomic.PathLike, shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `statistics` of `corpus.json`.

    Args:
        folder: the corpus folder.
        shards: one or more, in order, with their `file`, their `rows` and, if their samples were drawn,
            `policy_logprob`: the sum over samples of the log-probability under the policy that drew them, in nats.

    Returns:
        Plain data, floats rounded to 6 decimals:

        - length {mean, std, min, median, max}: tokens per sample, a stop id counted; std is that of these very samples
          (their number divides the squares).
        - stopped: share of the samples that a stop id ended.
        - nll_per_token: −Σ logprob / Σ tokens in nats: how unlikely the source at temperature 1 finds the text; null
          if any sample has no logprob.
        - entropy_per_token: −Σ policy_logprob / Σ tokens in nats, null if any shard has none: how much choice the
          policy left. −log p of what is drawn from a distribution is in expectation its entropy, and a text's is the
          sum of its tokens', so that the numerator is unbiased and no distribution need be kept.
        - distinct {tokens, 1, 2, 3, 4}: different n-grams / n-grams, none across the end of a sample (distinct-n,
          Li et al. 2016, arXiv:1510.03055). It falls as a text grows, so that corpora compare only at one size: it is
          measured on the first whole samples that have at most 2^18 tokens together. `tokens` says how many they
          have; much fewer than 2^18 mean a corpus too small for the comparison.
        - duplicates: share of the samples whose tokens are those of an earlier sample.
    """
    samples = sum(shard["rows"] for shard in shards)
    lengths: Counter[int] = Counter()
    hashes = np.empty(samples, np.uint64)
    stopped = row = 0
    logprob = 0.0
    for batch in _read(folder, shards, ["tokens", "logprob", "finish_reason"]):
        flat, batch_lengths = _tokens_of(batch)
        lengths.update(batch_lengths.tolist())
        hashes[row : row + len(batch_lengths)] = _hash_samples(flat, batch_lengths)
        row += len(batch_lengths)
        stopped += pc.equal(batch.column("finish_reason"), "stop").true_count
        logprob += math.fsum(batch.column("logprob").to_numpy(zero_copy_only=False).tolist())  # null is nan
    tokens = sum(length * count for length, count in lengths.items())
    policy_logprobs = [shard.get("policy_logprob") for shard in shards]
    policy_logprob = math.fsum(math.nan if value is None else value for value in policy_logprobs)
    return _to_json(
        {
            "length": length_statistics(lengths),
            "stopped": stopped / samples,
            "nll_per_token": _ratio(-logprob, tokens),
            "entropy_per_token": _ratio(-policy_logprob, tokens),
            "distinct": distinct_ngrams(*_head(folder, shards, DISTINCT_TOKENS)),
            "duplicates": _count_repeated(hashes) / samples,
        }
    )


def length_statistics(lengths: Mapping[int, int]) -> dict[str, float]:
    """Mean, standard deviation, minimum, median and maximum of the lengths, given as {length: number of samples}."""
    ascending = sorted(lengths)
    up_to = np.cumsum([lengths[length] for length in ascending])
    n = int(up_to[-1])
    total = sum(length * count for length, count in lengths.items())
    squares = sum(length**2 * count for length, count in lengths.items())
    lower, upper = (ascending[place] for place in np.searchsorted(up_to, [(n - 1) // 2, n // 2], side="right"))
    return {
        "mean": total / n,
        "std": math.sqrt(n * squares - total**2) / n,  # integers up to the root, so that nothing cancels
        "min": ascending[0],
        "median": (lower + upper) / 2,
        "max": ascending[-1],
    }


def distinct_ngrams(flat: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """Share of different n-grams among all n-grams within samples; see `corpus_statistics`.

    Exact: each n-gram is known by its rank among those of its order, which with the rank of the next token makes the
    key of the n+1-gram (the naming of Karp, Miller & Rosenberg 1972), so that any vocabulary fits into 64 bits.

    Args:
        flat: integer [sum of lengths], fewer than 2^31 tokens: the samples one after the other.
        lengths: integer [N].

    Returns:
        {"tokens": sum of lengths, "1": share, …}; the share is nan where no sample is that long.
    """
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(flat))  # tokens from each place to its sample's end
    words, word = np.unique(flat, return_inverse=True)
    found: dict[str, float] = {"tokens": len(flat)}
    gram = np.zeros(len(flat), np.int64)  # of n−1 tokens, by the place of the first; there is but one of none
    for n in DISTINCT_ORDERS:
        places = np.flatnonzero(left >= n)
        different, rank = np.unique(gram[places] * len(words) + word[places + n - 1], return_inverse=True)
        gram[places] = rank
        found[str(n)] = _ratio(len(different), len(places))
    return found


def _read(folder: atomic.PathLike, shards: Sequence[Mapping[str, Any]], columns: list[str]) -> Iterator[pa.RecordBatch]:
    for shard in shards:
        with pq.ParquetFile(Path(folder, shard["file"])) as file:
            yield from file.iter_batches(_BATCH_ROWS, columns=columns)


def _tokens_of(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """The batch's tokens end to end and their number in each sample."""
    lists = batch.column("tokens")
    return lists.flatten().to_numpy(), pc.list_value_length(lists).to_numpy()


def _head(folder: atomic.PathLike, shards: Sequence[Mapping[str, Any]], most: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (end to end) and lengths of the first samples, up to the first with which they had more than `most`."""
    tokens, lengths = [], []
    for batch in _read(folder, shards, ["tokens"]):
        flat, batch_lengths = _tokens_of(batch)
        ends = np.cumsum(batch_lengths, dtype=np.int64)
        fitting = int(np.searchsorted(ends, most, side="right"))
        used = int(ends[fitting - 1]) if fitting else 0
        tokens.append(flat[:used])
        lengths.append(batch_lengths[:fitting])
        most -= used
        if fitting < len(ends):
            break
    return np.concatenate(tokens), np.concatenate(lengths)


def _hash_samples(flat: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """BLAKE2b (RFC 7693) of each sample's tokens as little-endian int32; uint64 [N]."""
    data = flat.astype("<i4", copy=False).tobytes()
    bounds = [0, *(4 * np.cumsum(lengths, dtype=np.int64)).tolist()]
    digests = (hashlib.blake2b(data[a:b], digest_size=_HASH_BYTES).digest() for a, b in pairwise(bounds))
    return np.frombuffer(b"".join(digests), "<u8")


def _count_repeated(hashes: np.ndarray) -> int:
    """How many of the values have occurred before. Sorts them in place."""
    hashes.sort()
    repeated = 0
    for first in range(0, len(hashes) - 1, _COMPARED_AT_ONCE):
        block = hashes[first : first + _COMPARED_AT_ONCE + 1]
        repeated += int(np.count_nonzero(block[1:] == block[:-1]))
    return repeated


def _ratio(numerator: float, denominator: int) -> float:
    return numerator / denominator if denominator else math.nan


def _to_json(value: Any) -> Any:
    """The same in JSON: floats rounded, no minus before zero, and null for what is no number."""
    if isinstance(value, dict):
        return {key: _to_json(inner) for key, inner in value.items()}
    if not isinstance(value, float):
        return value
    return round(value, _DECIMALS) + 0.0 if math.isfinite(value) else None
