"""Import of real text as a corpus.

The source is read twice: once to check, count and hash its documents, once to tokenize the missing shards; a source
that changes in between is refused. Memory holds one shard of text. Special strings (`<|endoftext|>`) are tokenized as
plain text; the stop id is appended to every document that is not truncated.
"""

from __future__ import annotations

import hashlib
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_selftrain.config import ImportCorpusConfig, yaml_io
from jax_selftrain.corpus.reader import Corpus
from jax_selftrain.corpus.schema import Sample
from jax_selftrain.corpus.shards import CorpusWriter
from jax_selftrain.corpus.token_source import encode_texts, tokenize_batch
from jax_selftrain.errors import InputError, library_errors_as_input_errors
from jax_selftrain.io.jsonl import check_text
from jax_selftrain.io.rows import read_rows

if TYPE_CHECKING:
    from jax_selftrain.hub import ModelRef

TextStream = Callable[[], Iterator[tuple[str, object]]]
"""Function that starts a pass over a source and yields (location, value) of each document."""


def import_text(config: ImportCorpusConfig) -> Corpus:
    """Create a corpus from real text; a rerun completes the folder.

    Blank documents are skipped. A document of more than `max_tokens` tokens (with its stop id) is truncated, as is its
    `text`; it has no stop id and finish reason `length`.

    Raises:
        InputError: an option is invalid; the source is missing, has no such field or split, or holds a value that is
            not text; the source differs from that of an earlier run.
    """
    from jax_selftrain import hub  # imports JAX and transformers, which readers of a corpus do not need

    yaml_io.require(config)
    model = hub.open_model(config.model)
    start_id = _choose_id(model, "start_id", config.start_id, model.special_tokens.bos_token_id)
    stop_id = _choose_id(model, "stop_id", config.stop_id, model.special_tokens.eos_token_id)
    texts = _open_source(config)
    digest, digest_again = hashlib.sha256(), hashlib.sha256()
    count = sum(1 for _ in _hash_texts(_valid_texts(texts, config.limit), digest))
    if not count:
        raise InputError(f"{config.source}: holds no text")
    request = {
        "kind": "imported",
        "source": {"ref": config.source, "fingerprint": digest.hexdigest()},
        "tokenizer_fingerprint": model.tokenizer_fingerprint,
        "start_id": start_id,
        "stop_ids": [stop_id],
        "policy": {"max_tokens": config.max_tokens},
        "seed": None,
        "samples": count,
        "samples_per_shard": config.samples_per_shard,
    }
    writer = CorpusWriter.open(config.out, request)
    yaml_io.save(writer.folder / "config.yaml", replace(config, start_id=start_id, stop_id=stop_id))
    changed = InputError(f"{config.source}: changed during the import; delete {config.out} and import it again")

    def convert(documents: list[str], ids: range) -> tuple[list[Sample], dict[str, int]]:
        if len(documents) != len(ids):
            raise changed
        return _tokenize(model.tokenizer, documents, ids, stop_id, config.max_tokens)

    if writer.missing():
        documents = _hash_texts(_valid_texts(texts, config.limit), digest_again)
        writer.convert_missing(documents, convert)
        deque(documents, maxlen=0)  # those after the last missing shard
        if digest_again.digest() != digest.digest():
            raise changed
    return writer.finalize()


def import_tokens(rows: np.ndarray, model: str, out: str | Path) -> Corpus:
    """Write token rows as documents without a stop id.

    Args:
        rows: int [N, T], tokens of the model's tokenizer.
        model: a model or tokenizer folder.
        out: the corpus folder to write.

    Raises:
        InputError: the model has no BOS or EOS, or the folder holds another corpus.
    """
    from jax_selftrain import hub

    source = hub.open_model(model)
    request = {
        "kind": "imported",
        "source": {"ref": "", "fingerprint": hashlib.sha256(rows.astype("<i4").tobytes()).hexdigest()},
        "tokenizer_fingerprint": source.tokenizer_fingerprint,
        "start_id": _choose_id(source, "start_id", None, source.special_tokens.bos_token_id),
        "stop_ids": [_choose_id(source, "stop_id", None, source.special_tokens.eos_token_id)],
        "policy": {"max_tokens": rows.shape[1]},
        "seed": None,
        "samples": len(rows),
        "samples_per_shard": ImportCorpusConfig().samples_per_shard,
    }

    def convert(items: list[np.ndarray], ids: range) -> tuple[list[Sample], dict[str, int]]:
        decode = partial(source.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        samples = [
            Sample(i, row, decode(row.tolist()), float("nan"), "length") for i, row in zip(ids, items, strict=True)
        ]
        return samples, {}

    writer = CorpusWriter.open(out, request)
    writer.convert_missing(iter(rows.astype(np.int32)), convert)
    return writer.finalize()


def _choose_id(model: ModelRef, name: str, flag: int | None, default: int | None) -> int:
    """Return the start or stop id: the option, else the model's."""
    value = default if flag is None else flag
    if value is None:
        raise InputError(f"{model.ref}: names neither BOS nor EOS; choose a token with {yaml_io.flag(name)}")
    from jax_selftrain.hub.tokenizer import vocabulary_range

    length, unused = vocabulary_range(model.tokenizer)
    if not 0 <= value < length or value in unused:
        raise InputError(f"{yaml_io.flag(name)} {value}: is no token of {model.ref}, whose ids are below {length}")
    return value


def _hash_texts(texts: Iterable[str], digest: hashlib._Hash) -> Iterator[str]:
    """Yield texts; add them, with their boundaries, to a hash."""
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
        yield text


def _valid_texts(texts: TextStream, limit: int | None) -> Iterator[str]:
    """Yield the first `limit` valid, non-blank texts of the source."""

    checked = (check_text(value, where) for where, value in texts())
    return islice((text for text in checked if text.strip()), limit)


def _tokenize(
    tokenizer: Any, texts: list[str], ids: range, stop_id: int, max_tokens: int | None
) -> tuple[list[Sample], dict[str, int]]:
    """Tokenize texts; count truncated ones that re-encode to other tokens."""
    samples, truncated = [], []
    encoded = chain.from_iterable(encode_texts(tokenizer, texts))
    for sample_id, text, tokens in zip(ids, texts, encoded, strict=True):
        if max_tokens is None or len(tokens) < max_tokens:
            sample = Sample(sample_id, np.array([*tokens, stop_id], np.int32), text, float("nan"), "stop")
        else:
            text = text[: tokenize_batch(tokenizer, [text]).token_to_chars(0, max_tokens - 1).end]
            sample = Sample(sample_id, np.array(tokens[:max_tokens], np.int32), text, float("nan"), "length")
            truncated.append(sample)
        samples.append(sample)
    again = chain.from_iterable(encode_texts(tokenizer, [sample.text for sample in truncated]))
    mismatches = sum(x != sample.tokens.tolist() for x, sample in zip(again, truncated, strict=True))
    return samples, {"mismatches": mismatches}


def _open_source(config: ImportCorpusConfig) -> TextStream:
    from jax_selftrain import hub

    kind, _, rest = config.source.partition(":")
    path = Path(config.source)
    if kind == "tfds":
        values = _open_tfds(rest, config)
    elif kind == "datasets" or path.is_dir():
        values = _open_dataset(rest if kind == "datasets" else path, config)
    elif path.is_file() or hub.parse_dataset_split(config.source) is not None:
        _refuse_split(config, "train")
        return lambda: (
            (where, _field(row, config.text_field, where))
            for file in hub.text_files(config.source)
            for where, row in read_rows(file)
        )
    else:
        raise InputError(
            f"{path}: no such file or folder; give a JSONL, Parquet or text file, org/name:SPLIT of the Hugging Face "
            "hub, a `save_to_disk` folder, tfds:FOLDER or datasets:NAME"
        )
    return lambda: ((f"{config.source} row {row}", value) for row, value in enumerate(values()))


def _field(entry: Mapping[str, object], text_field: str, where: str) -> object:
    if text_field not in entry:
        names = ", ".join(map(str, entry)) or "none"
        raise InputError(
            f"{where}: has no field {text_field!r} (its fields: {names}); name the right one with --text-field"
        )
    return entry[text_field]


def _refuse_split(config: ImportCorpusConfig, only: str) -> None:
    """Refuse a split other than the only one of a source."""
    if config.split not in ("train", only):
        raise InputError(f"--split {config.split}: {config.source} has no splits; drop --split, or name another source")


def _check_split(config: ImportCorpusConfig, split: str, found: Mapping[str, Any]) -> None:
    if split not in found:
        raise InputError(
            f"{config.source}: has no split {config.split!r} (it has: {', '.join(found)}); choose with --split"
        )


def _open_dataset(name: str | Path, config: ImportCorpusConfig) -> Callable[[], Iterable[object]]:
    """Open a named data set, or a folder of `save_to_disk`."""
    if isinstance(name, Path) and (name / "dataset_info.json").exists() and (name / "features.json").exists():
        raise InputError(f"{name}: is a TFDS folder; write tfds:{name}")
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{config.source}: reading it needs `datasets`; pip install datasets") from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    function = "load_from_disk" if isinstance(name, Path) else "load_dataset"
    with library_errors_as_input_errors(f"{config.source}: `datasets.{function}` cannot open it"):
        if isinstance(name, Path):
            found: Any = datasets.load_from_disk(str(name))
        else:
            path, _, subset = name.partition(":")
            found = datasets.load_dataset(path, subset or None, split=config.split)
    if isinstance(found, datasets.DatasetDict):
        _check_split(config, config.split, found)
        found = found[config.split]
    elif isinstance(name, Path):
        _refuse_split(config, str(found.split))
    _field(dict.fromkeys(found.column_names), config.text_field, config.source)
    column = found.select_columns([config.text_field])
    return lambda: chain.from_iterable(batch[config.text_field] for batch in column.iter(batch_size=256))


def _open_tfds(folder: str, config: ImportCorpusConfig) -> Callable[[], Iterable[object]]:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            f"{config.source}: reading it needs tensorflow-datasets; pip install tensorflow-datasets"
        ) from error
    if not Path(folder, "dataset_info.json").is_file():
        raise InputError(f"{config.source}: not a TFDS folder (no dataset_info.json); give the folder of one version")
    with library_errors_as_input_errors(  # before version 4 there was no features.json
        f"{config.source}: tensorflow-datasets cannot open it",
        "copy the folder again, or prepare the data set with tensorflow-datasets 4 or later",
    ):
        builder = tfds.builder_from_directory(folder)
        features = dict.fromkeys(builder.info.features)
    for part in config.split.split("+"):
        _check_split(config, part.partition("[")[0].strip(), builder.info.splits)
    _field(features, config.text_field, config.source)
    with library_errors_as_input_errors(
        f"{config.source}: --split {config.split} of {builder.info.file_format.value} files cannot be read",
        "check the split, or prepare the data set with file_format array_record or parquet",
    ):
        rows = builder.as_data_source(split=config.split)

    def read() -> Iterator[object]:
        for row in range(len(rows)):
            with library_errors_as_input_errors(f"{config.source} row {row}: cannot be read"):
                value = rows[row][config.text_field]
            if value is None:
                raise InputError(f"{config.source} row {row}: is missing; its file is damaged, so copy it again")
            yield value

    return read
