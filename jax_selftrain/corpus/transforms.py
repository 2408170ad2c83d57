"""Corpora made from other corpora: retokenized, or with shuffled tokens.

Retokenizing brings text to a student with another tokenizer, and, so that all cells of a study are treated equally, a
model's own text to itself. Only text is carried over. A document that ended with a stop id ends with the student's stop
id; one that ended by length has none. Special strings are plain text. The source's tokenizer decodes invalid UTF-8 to
U+FFFD, which is dropped. `corpus.json` counts the losses under `retokenized`.

Shuffling the tokens of every document keeps token frequencies and destroys the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_selftrain.corpus.ingest import encode_texts, text_batches
from jax_selftrain.corpus.reader import Corpus, open_corpus
from jax_selftrain.corpus.schema import Sample
from jax_selftrain.corpus.shards import (
    MANIFEST,
    finalize_corpus,
    init_corpus,
    missing_shards,
    read_records,
    shard_count,
    shard_ids,
    write_shard,
)
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.io.rng import make_rng, random_permutation
from jax_selftrain.version import versions

if TYPE_CHECKING:
    from jax_selftrain.hub import ModelRef
    from jax_selftrain.hub.model_ref import Ref

REPLACEMENT_CHAR = "\N{REPLACEMENT CHARACTER}"
"""Decoding of bytes that are not UTF-8."""

_COUNTS = ("changed", "broken_characters", "empty", "source_tokens", "text_bytes")
_NO_LOGPROB = float("nan")


def retokenize(
    corpus: atomic.PathLike | Corpus, model: Ref | ModelRef, out: atomic.PathLike, *, stop_id: int | None = None
) -> Corpus:
    """Tokenize the texts of a corpus for another model.

    Args:
        corpus: a corpus, or its folder.
        model: a model or tokenizer folder.
        out: the corpus folder to write, with the same documents in the same order.
        stop_id: token that ends a text for the model; by default the tokenizer's EOS, else the first EOS of the model's
            configs. (Some models end texts with another token: stories260K with BOS.)

    Raises:
        InputError: a folder cannot be read or written, the model has no BOS or EOS, or `out` holds another corpus.
    """
    from jax_selftrain import hub  # imports JAX and transformers, which readers of a corpus do not need

    source, target = open_corpus(corpus), hub.open_model(model)
    tokenizer = target.tokenizer
    start_id = target.special_tokens.bos_token_id
    stop_id = target.special_tokens.eos_token_id if stop_id is None else stop_id
    if start_id is None or stop_id is None:
        raise InputError(f"{target.ref}: names no BOS or no EOS, so documents cannot start and end in its tokens")
    fingerprint = target.tokenizer_fingerprint
    same = fingerprint == source.manifest["tokenizer_fingerprint"]

    def convert(samples: list[Sample]) -> tuple[list[Sample], dict[str, int]]:
        texts = [sample.text.replace(REPLACEMENT_CHAR, "") for sample in samples]
        counts = dict.fromkeys(_COUNTS, 0)
        converted: list[Sample] = []
        for first, last in text_batches(texts):
            for i, tokens in enumerate(encode_texts(tokenizer, texts[first:last])["input_ids"], start=first):
                sample, text = samples[i], texts[i]
                ended = sample.finish_reason == "stop"
                row = np.array([*tokens, *([stop_id] if ended else [])], np.int32)
                counts["broken_characters"] += sample.text.count(REPLACEMENT_CHAR)
                counts["empty"] += not tokens
                counts["source_tokens"] += len(sample.tokens)
                counts["text_bytes"] += len(text.encode())
                counts["changed"] += same and not np.array_equal(row, sample.tokens)
                converted.append(Sample(sample.sample_id, row, text, _NO_LOGPROB, sample.finish_reason))
        return converted, counts

    provenance = {"tokenizer_fingerprint": fingerprint, "start_id": start_id, "stop_ids": [stop_id]}
    return map_corpus(source, Path(out), "retokenized", provenance, {}, convert)


def shuffle(corpus: atomic.PathLike | Corpus, model: Ref | ModelRef, out: atomic.PathLike, seed: int) -> Corpus:
    """Shuffle the tokens of every document, except its stop id.

    Args:
        corpus: a corpus, or its folder.
        model: the model or tokenizer folder of its tokens, which decodes the shuffled tokens.
        out: the corpus folder to write.
        seed: seed of the orders; that of document i depends on (seed, i) alone.

    Raises:
        InputError: a folder cannot be read or written, or the corpus has another tokenizer.
    """
    from jax_selftrain import hub

    target = hub.open_model(model)
    source, tokenizer = open_corpus(corpus, tokenizer_fingerprint=target.tokenizer_fingerprint), target.tokenizer

    def convert(samples: list[Sample]) -> tuple[list[Sample], dict[str, int]]:
        converted = []
        for sample in samples:
            n = len(sample.tokens) - (sample.finish_reason == "stop")
            order = random_permutation(make_rng("shuffled tokens", seed, sample.sample_id), n)
            row = np.concatenate([sample.tokens[:n][order], sample.tokens[n:]])
            text = tokenizer.decode(row[:n].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
            converted.append(Sample(sample.sample_id, row, text, _NO_LOGPROB, sample.finish_reason))
        return converted, {}

    inherited = {key: source.manifest[key] for key in ("tokenizer_fingerprint", "start_id", "stop_ids")}
    return map_corpus(source, Path(out), "shuffled", inherited, {"shuffle_seed": seed}, convert)


def map_corpus(
    source: Corpus,
    out: Path,
    transform_name: str,
    inherited: Mapping[str, Any],
    policy: Mapping[str, Any],
    convert: Callable[[list[Sample]], tuple[list[Sample], dict[str, int]]],
    keep_ids: np.ndarray | None = None,
) -> Corpus:
    """Write the missing shards of a corpus converted from another.

    Args:
        source: the corpus to convert.
        out: the corpus folder to write.
        transform_name: `kind` of the result.
        inherited: further fields of `corpus.json`.
        policy: additions to the source's `policy`.
        convert: convert samples; return them and counts for the shard's record.
        keep_ids: ascending sample ids of the documents to keep, which get new ids; None keeps all.
    """
    ids = range(len(source)) if keep_ids is None else keep_ids.tolist()
    samples, per_shard = len(ids), source.manifest["samples_per_shard"]
    request = init_corpus(
        out,
        {
            "kind": transform_name,
            "source": {"ref": str(source.folder), "fingerprint": source.fingerprint},
            "policy": {**source.manifest["policy"], **policy},
            "seed": source.manifest["seed"],
            "samples": samples,
            "samples_per_shard": per_shard,
            **inherited,
        },
    )
    missing = missing_shards(out, shard_count(samples, per_shard))
    chosen = _select(source, ids)
    position = 0
    for index in missing:
        numbers = shard_ids(index, samples, per_shard)
        shard = [
            replace(sample, sample_id=number)
            for number, sample in zip(
                numbers, islice(chosen, numbers.start - position, numbers.stop - position), strict=True
            )
        ]
        position = numbers.stop
        converted, counts = convert(shard)
        write_shard(out, index, converted, {**counts, "versions": versions()})
    if missing or not (out / MANIFEST).exists():
        totals = _totals(out) if transform_name == "retokenized" else {}
        finalize_corpus(out, {**request, **({"retokenized": totals} if totals else {})})
    return open_corpus(out)


def _select(source: Corpus, ids: Sequence[int]) -> Iterator[Sample]:
    """Yield the samples with the given ascending ids."""
    wanted = iter(ids)
    next_id = next(wanted, None)
    for sample in source.iter_samples():
        if sample.sample_id == next_id:
            yield sample
            next_id = next(wanted, None)


def _totals(out: Path) -> dict[str, int]:
    records = read_records(out).values()
    return {name: sum(record[name] for record in records) for name in _COUNTS}
