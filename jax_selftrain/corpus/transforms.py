"""Corpora made from other corpora: carried to another tokenizer through text, or with their tokens shuffled.

**Retokenizing** is how text reaches a student whose tokenizer is not the source's – and, so that no cell of a study has
an advantage, how a model's own text reaches itself. Only text travels. What ends a document is carried by structure:
a document that the source ended with a stop id ends with the student's, one that was cut at the length limit keeps no
stop id. Special strings in the text are read as plain text. Bytes that are no text (the source drew half of a UTF-8
character) come out of the source's tokenizer as U+FFFD and are dropped.

What is lost on the way is counted in `corpus.json` under `retokenized`: documents whose tokens are other ones (where
the tokenizer is the same), broken characters dropped, documents left empty, and tokens and bytes before and after.

**Shuffling** draws a new order of every document's tokens: what remains is how often tokens occur, and no text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

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

REPLACEMENT_CHAR = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer makes of bytes that are no UTF-8."""

_COUNTS = ("changed", "broken_characters", "empty", "source_tokens", "text_bytes")
_NOT_DRAWN = float("nan")


def retokenize(corpus: atomic.PathLike, model: str, out: atomic.PathLike, *, stop_id: int | None = None) -> Corpus:
    """The texts of a corpus in the tokens of a model; running it again completes it or finds it whole.

    Args:
        corpus: a corpus folder.
        model: the model, or tokenizer folder, whose tokens are wanted.
        out: the corpus folder to write. It has the same documents in the same order, none left out.
        stop_id: the token that ends a text for the model; unset: the tokenizer's EOS, else the first that its configs
            call EOS. (Some models end texts with another: stories260K with BOS.)

    Raises:
        InputError: a folder cannot be read or written, the model names no BOS or EOS, or `out` holds another corpus.
    """
    from jax_selftrain import hub  # it loads JAX and transformers, which reading a corpus does not need

    source, target = open_corpus(corpus), hub.open_model(model)
    tokenizer = target.tokenizer
    start_id = target.special_tokens.bos_token_id
    stop_id = target.special_tokens.eos_token_id if stop_id is None else stop_id
    if start_id is None or stop_id is None:
        raise InputError(f"{model}: names neither BOS nor EOS, so that no document can begin and end in its tokens")
    mark = target.tokenizer_fingerprint
    same = mark == source.manifest["tokenizer_fingerprint"]

    def convert(samples: list[Sample]) -> tuple[list[Sample], dict[str, int]]:
        texts = [sample.text.replace(REPLACEMENT_CHAR, "") for sample in samples]
        counts = dict.fromkeys(_COUNTS, 0)
        converted: list[Sample] = []
        for first, last in text_batches(texts):
            for place, tokens in enumerate(encode_texts(tokenizer, texts[first:last])["input_ids"], start=first):
                sample, text = samples[place], texts[place]
                ended = sample.finish_reason == "stop"
                row = np.array([*tokens, *([stop_id] if ended else [])], np.int32)
                counts["broken_characters"] += sample.text.count(REPLACEMENT_CHAR)
                counts["empty"] += not tokens
                counts["source_tokens"] += len(sample.tokens)
                counts["text_bytes"] += len(text.encode())
                counts["changed"] += same and not np.array_equal(row, sample.tokens)
                converted.append(Sample(sample.sample_id, row, text, _NOT_DRAWN, sample.finish_reason))
        return converted, counts

    provenance = {"tokenizer_fingerprint": mark, "start_id": start_id, "stop_ids": [stop_id]}
    return map_corpus(source, Path(out), "retokenized", provenance, {}, convert)


def shuffle(corpus: atomic.PathLike, model: str, out: atomic.PathLike, seed: int) -> Corpus:
    """A corpus with the tokens of every document in a random order; a stop id stays at the end.

    Args:
        corpus: a corpus folder.
        model: the model, or tokenizer folder, that its tokens belong to; it makes the text that they now stand for.
        out: the corpus folder to write.
        seed: of the orders; that of document i depends on (seed, i) alone.

    Raises:
        InputError: a folder cannot be read or written, or the tokenizer is not the corpus's.
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
            converted.append(Sample(sample.sample_id, row, text, _NOT_DRAWN, sample.finish_reason))
        return converted, {}

    described = {key: source.manifest[key] for key in ("tokenizer_fingerprint", "start_id", "stop_ids")}
    return map_corpus(source, Path(out), "shuffled", described, {"shuffle_seed": seed}, convert)


def map_corpus(
    source: Corpus,
    out: Path,
    transform_name: str,
    described: Mapping[str, Any],
    policy: Mapping[str, Any],
    convert: Callable[[list[Sample]], tuple[list[Sample], dict[str, int]]],
    keep_ids: np.ndarray | None = None,
) -> Corpus:
    """Write the missing shards of a corpus made document by document from another one; counts go to `corpus.json`.

    With `kept`, ascending sample ids of the source, only those documents are carried over, and numbered anew.
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
            **described,
        },
    )
    missing = missing_shards(out, shard_count(samples, per_shard))
    chosen = _chosen(source, ids)
    at = 0
    for index in missing:
        numbers = shard_ids(index, samples, per_shard)
        shard = [
            replace(sample, sample_id=number)
            for number, sample in zip(numbers, islice(chosen, numbers.start - at, numbers.stop - at), strict=True)
        ]
        at = numbers.stop
        converted, counts = convert(shard)
        write_shard(out, index, converted, {**counts, "versions": versions()})
    if missing or not (out / MANIFEST).exists():
        totals = _totals(out) if transform_name == "retokenized" else {}
        finalize_corpus(out, {**request, **({"retokenized": totals} if totals else {})})
    return open_corpus(out)


def _chosen(source: Corpus, ids: Sequence[int]) -> Iterator[Sample]:
    """The samples with these ids, which ascend."""
    wanted = iter(ids)
    next_id = next(wanted, None)
    for sample in source.iter_samples():
        if sample.sample_id == next_id:
            yield sample
            next_id = next(wanted, None)


def _totals(out: Path) -> dict[str, int]:
    records = read_records(out).values()
    return {name: sum(record[name] for record in records) for name in _COUNTS}
