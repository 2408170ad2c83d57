"""Corpora made from other corpora: retokenized, shuffled, decontaminated, subsets.

Retokenizing brings text to a student with another tokenizer, and, so that all cells of a study are treated equally, a
model's own text to itself. Only text is carried over. A document that ended with a stop id ends with the student's stop
id; one that ended by length has none. Special strings are plain text. The source's tokenizer decodes invalid UTF-8 to
U+FFFD, which is dropped. `corpus.json` counts the losses under `retokenized`.

Shuffling the tokens of every document keeps token frequencies and destroys the text.

A decontaminated corpus lacks every document that shares a run of tokens with some sequences: its student did not read
them. It is also smaller and holds other text. The size-matched control therefore drops equally many other documents of
the same finish reasons and similar lengths.

A subset has random documents up to a number of tokens or bytes. Draw k of subset s is keyed by (seed, s, k), so that a
larger subset begins with the draws of a smaller one and subsets are independent replicates. arXiv:2605.31126 draws with
replacement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_selftrain.config import SubsetConfig, yaml_io
from jax_selftrain.corpus.overlap import longest_overlaps
from jax_selftrain.corpus.reader import Corpus, open_corpus
from jax_selftrain.corpus.schema import Sample
from jax_selftrain.corpus.shards import CorpusWriter
from jax_selftrain.corpus.token_source import RaggedTokens, encode_texts
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.io.json_files import hash_json
from jax_selftrain.io.rng import make_rng, random_permutation

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
    start_id = target.special_tokens.bos_token_id
    stop_id = target.special_tokens.eos_token_id if stop_id is None else stop_id
    if start_id is None or stop_id is None:
        raise InputError(f"{target.ref}: names no BOS or no EOS, so documents cannot start and end in its tokens")
    facts = {"tokenizer_fingerprint": target.tokenizer_fingerprint, "start_id": start_id, "stop_ids": [stop_id]}
    same = target.tokenizer_fingerprint == source.manifest["tokenizer_fingerprint"]

    def convert(samples: list[Sample]) -> tuple[list[Sample], dict[str, int]]:
        texts = [sample.text.replace(REPLACEMENT_CHAR, "") for sample in samples]
        counts = dict.fromkeys(_COUNTS, 0)
        converted = []
        encoded = chain.from_iterable(encode_texts(target.tokenizer, texts))
        for sample, text, tokens in zip(samples, texts, encoded, strict=True):
            row = np.array([*tokens, *([stop_id] if sample.finish_reason == "stop" else [])], np.int32)
            counts["broken_characters"] += sample.text.count(REPLACEMENT_CHAR)
            counts["empty"] += not tokens
            counts["source_tokens"] += len(sample.tokens)
            counts["text_bytes"] += len(text.encode())
            counts["changed"] += same and not np.array_equal(row, sample.tokens)
            converted.append(replace(sample, tokens=row, text=text, logprob=_NO_LOGPROB))
        return converted, counts

    return map_corpus(source, out, "retokenized", facts, convert, counts=_COUNTS)


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
            converted.append(replace(sample, tokens=row, text=text, logprob=_NO_LOGPROB))
        return converted, {}

    return map_corpus(source, out, "shuffled", {"policy": {"shuffle_seed": seed}}, convert)


def remove_overlapping(
    corpus: atomic.PathLike | Corpus, sequences: np.ndarray, out: atomic.PathLike, *, length: int = 16
) -> Corpus:
    """Copy a corpus without the documents that share tokens with a sequence.

    Args:
        corpus: a corpus, or its folder.
        sequences: int [N, S], tokens of the corpus's tokenizer.
        out: the corpus folder to write; its documents get new ids.
        length: number of consecutive shared tokens (S if fewer) that drops a document.

    Raises:
        InputError: a folder cannot be read or written, `out` holds another corpus, or every document is dropped.
    """
    source = open_corpus(corpus)
    overlapping = _overlaps_any(source, sequences, length)
    if overlapping.all():
        raise InputError(
            f"{source.folder}: every document shares {length} tokens with a held-out sequence; none would remain"
        )
    return _write_without(source, out, "decontaminated", overlapping, sequences, length=length)


def size_matched_control(
    corpus: atomic.PathLike | Corpus, sequences: np.ndarray, out: atomic.PathLike, *, seed: int, length: int = 16
) -> Corpus:
    """Drop as many documents as `remove_overlapping`, but without overlap.

    For each overlapping document, in a random order, the document of the same finish reason and the nearest length is
    dropped; of several the first in that order.

    Args:
        corpus, sequences, out, length: see `remove_overlapping`.
        seed: seed of the order.

    Raises:
        InputError: a folder cannot be read or written, `out` holds another corpus, or there are too few others.
    """
    source = open_corpus(corpus)
    dropped = choose_size_matched(source, _overlaps_any(source, sequences, length), seed)
    return _write_without(source, out, "size-matched control", dropped, sequences, length=length, seed=seed)


def choose_size_matched(source: Corpus, overlapping: np.ndarray, seed: int) -> np.ndarray:
    """Choose documents without overlap that match those with overlap.

    Args:
        source: the corpus.
        overlapping: bool [N].
        seed: seed of the order, see `size_matched_control`.

    Returns:
        bool [N]: True for the chosen documents.

    Raises:
        InputError: there are too few documents without overlap.
    """
    _, offsets, reasons = source.token_arrays()
    lengths = np.diff(offsets)
    order = random_permutation(make_rng("size-matched control", seed), len(source))
    dropped = np.zeros(len(source), bool)
    for reason in np.unique(reasons[overlapping]):
        same_reason = order[reasons[order] == reason]
        free, wanted = same_reason[~overlapping[same_reason]], same_reason[overlapping[same_reason]]
        if len(free) < len(wanted):
            raise InputError(
                f"{source.folder}: too few documents without overlap to match those with overlap; sample more documents"
            )
        for document in wanted:
            distance = np.where(dropped[free], np.iinfo(np.int64).max, np.abs(lengths[free] - lengths[document]))
            dropped[free[np.argmin(distance)]] = True
    return dropped


def _overlaps_any(source: Corpus, sequences: np.ndarray, length: int) -> np.ndarray:
    """Return bool [N]: True for documents that overlap with a sequence."""
    shortest = min(length, sequences.shape[1])
    return longest_overlaps(source, RaggedTokens.from_list(sequences), min_length=shortest).length >= shortest


def _write_without(
    source: Corpus, out: atomic.PathLike, kind: str, dropped: np.ndarray, sequences: np.ndarray, **options: int
) -> Corpus:
    facts: dict[str, Any] = {
        "policy": {f"{kind} {name}": value for name, value in options.items()},
        "dropped": int(dropped.sum()),
        "held_out_sequences": hash_json(np.asarray(sequences, np.int64).tolist()),
    }
    return map_corpus(source, out, kind, facts, lambda samples: (samples, {}), copies=~dropped)


def draw_subset(config: SubsetConfig) -> Corpus:
    """Write documents drawn from a corpus until the budget is reached.

    The last draw may exceed the budget. Documents are in the order of the source; one drawn twice is there twice.

    Raises:
        InputError: an option is out of range, a folder cannot be read or written, or the corpus has too few tokens.
    """
    yaml_io.require(config)
    check_subset(config)
    source = open_corpus(config.corpus)
    if config.tokens is None:
        unit, lengths = "bytes", np.array([len(text.encode()) for text in source.iter_texts()])
    else:
        unit, lengths = "tokens", np.concatenate([lengths for _, lengths in source.token_batches()])
    copies = count_draws(lengths, unit, config, where=config.corpus)
    policy = {f"subset {name}": getattr(config, name) for name in (unit, "draw", "subset", "seed")}
    return map_corpus(source, config.out, "subset", {"policy": policy}, lambda samples: (samples, {}), copies=copies)


def check_subset(config: SubsetConfig) -> None:
    """Refuse a subset without a budget, or with two."""
    if (config.tokens is None) == (config.bytes is None):
        raise InputError("a subset has a number of --tokens or of --bytes; give one of them")


def count_draws(lengths: np.ndarray, unit: str, config: SubsetConfig, *, where: str) -> np.ndarray:
    """Count how often each document is drawn.

    Args:
        lengths: int [N], tokens or bytes of each document.
        unit: unit of the lengths and of the budget, `tokens` or `bytes`.
        config: the budget, the draw and the key of the draws.
        where: the corpus, for messages.

    Returns:
        int64 [N].
    """
    total, budget = int(lengths.sum()), getattr(config, unit)
    if not total:
        raise InputError(f"{where}: has no {unit}; sample longer texts")
    if config.draw == "without-replacement" and total < budget:
        raise InputError(
            f"{where}: has {total:,} {unit}, less than the {budget:,} to draw without replacement; sample more, lower "
            f"--{unit}, or draw with --draw bootstrap"
        )
    rng = make_rng("subset", config.seed, config.subset)
    order, drawn = np.zeros(0, np.int64), np.zeros(1, np.int64)
    if config.draw == "without-replacement":
        order = random_permutation(rng, len(lengths))
        drawn = np.cumsum(lengths[order])
    while drawn[-1] < budget:
        # 64 random bits modulo N: the bias is below N / 2^64.
        more = (rng.bit_generator.random_raw(4096) % np.uint64(len(lengths))).astype(np.int64)
        order = np.concatenate([order, more])
        drawn = np.cumsum(lengths[order])
    return np.bincount(order[: np.searchsorted(drawn, budget) + 1], minlength=len(lengths))


def map_corpus(
    source: Corpus,
    out: atomic.PathLike,
    kind: str,
    facts: Mapping[str, Any],
    convert: Callable[[list[Sample]], tuple[list[Sample], dict[str, int]]],
    *,
    copies: np.ndarray | None = None,
    counts: Sequence[str] = (),
) -> Corpus:
    """Write the missing shards of a corpus converted from another.

    Args:
        source: the corpus to convert.
        out: the corpus folder to write.
        kind: `kind` of the result.
        facts: fields of `corpus.json` that differ from the source's, and additions to its `policy`.
        convert: convert samples; return them and `counts` for the shard's record.
        copies: int or bool [N], copies of each document, which get new ids; None: one of each.
        counts: names of counts whose sums are stored in `corpus.json` under `kind`.
    """
    copies = np.ones(len(source), int) if copies is None else copies.astype(int)
    inherited = ("tokenizer_fingerprint", "start_id", "stop_ids", "seed", "samples_per_shard")
    request = {
        **{key: source.manifest[key] for key in inherited},
        **facts,
        "kind": kind,
        "source": {"ref": str(source.folder), "fingerprint": source.fingerprint},
        "policy": {**source.manifest["policy"], **facts.get("policy", {})},
        "samples": int(copies.sum()),
    }
    writer = CorpusWriter.open(out, request)
    writer.convert_missing(
        (sample for sample in source.iter_samples() for _ in range(copies[sample.sample_id])),
        lambda samples, ids: convert([replace(x, sample_id=i) for x, i in zip(samples, ids, strict=True)]),
    )
    totals = {name: sum(record[name] for record in writer.records()) for name in counts}
    return writer.finalize({kind: totals} if totals else {})
