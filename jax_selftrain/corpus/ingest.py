"""Import of real text as a corpus.

The source is read twice: once to check, count and hash its documents, once to tokenize the missing shards; a source
that changes in between is refused. Memory holds one shard of text. Special strings (`<|endoftext|>`) are tokenized as
plain text; the stop id is appended to every document that is not truncated.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_selftrain.config import ImportCorpusConfig, yaml_io
from jax_selftrain.corpus.reader import Corpus, open_corpus
from jax_selftrain.corpus.schema import Sample
from jax_selftrain.corpus.shards import (
    finalize_corpus,
    init_corpus,
    missing_shards,
    shard_count,
    shard_ids,
    write_shard,
)
from jax_selftrain.errors import InputError
from jax_selftrain.io.jsonl import read_jsonl
from jax_selftrain.version import versions

if TYPE_CHECKING:
    from jax_selftrain.hub import SpecialTokens

_ENCODE_CHARACTERS = 1 << 20  # characters of a batch of texts to tokenize

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
    for name in ("limit", "max_tokens", "samples_per_shard"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"{yaml_io.flag(name)} must be at least 1, not {value}")
    out = Path(config.out)
    model = hub.open_model(config.model)
    tokenizer = model.tokenizer
    start_id, stop_id = _bos_eos(config, model.special_tokens, len(tokenizer))
    texts = _open_source(config)
    first_pass = _SourceDigest()
    for _ in first_pass.wrap(_documents(texts, config.limit)):
        pass
    if not first_pass.count:
        raise InputError(f"{config.source}: holds no text")
    request = {
        "kind": "imported",
        "source": {"ref": config.source, "fingerprint": first_pass.digest},
        "tokenizer_fingerprint": model.tokenizer_fingerprint,
        "start_id": start_id,
        "stop_ids": [stop_id],
        "policy": {"max_tokens": config.max_tokens},
        "seed": None,
        "samples": first_pass.count,
        "samples_per_shard": config.samples_per_shard,
    }
    request = init_corpus(out, request)
    yaml_io.save(out / "config.yaml", replace(config, start_id=start_id, stop_id=stop_id))
    missing = missing_shards(out, shard_count(first_pass.count, config.samples_per_shard))
    changed = InputError(f"{config.source}: changed during the import; delete {out} and import it again")
    second_pass = _SourceDigest()
    documents = second_pass.wrap(_documents(texts, config.limit))
    for index in missing:
        ids = shard_ids(index, first_pass.count, config.samples_per_shard)
        shard = list(islice(documents, ids.start - second_pass.count, ids.stop - second_pass.count))
        if len(shard) != len(ids):
            raise changed
        samples, mismatches = _tokenize(tokenizer, shard, ids, stop_id, config.max_tokens)
        write_shard(out, index, samples, {"mismatches": mismatches, "versions": versions()})
    if missing:
        for _ in documents:
            pass  # read to the end to compare the digests
        if second_pass.digest != first_pass.digest:
            raise changed
    finalize_corpus(out, request)
    return open_corpus(out)


def _bos_eos(config: ImportCorpusConfig, special: SpecialTokens, tokenizer_length: int) -> tuple[int, int]:
    """Return start and stop id: the option, else the model's."""
    ids = {"start_id": (config.start_id, special.bos_token_id), "stop_id": (config.stop_id, special.eos_token_id)}
    found = []
    for name, (flag, default) in ids.items():
        value = default if flag is None else flag
        if value is None:
            raise InputError(f"{config.model}: names neither BOS nor EOS; choose a token with {yaml_io.flag(name)}")
        if not 0 <= value < tokenizer_length:
            raise InputError(
                f"{yaml_io.flag(name)} {value}: the tokenizer of {config.model} has only {tokenizer_length} tokens"
            )
        found.append(value)
    return found[0], found[1]


class _SourceDigest:
    """Count and SHA-256 of a stream of documents."""

    def __init__(self) -> None:
        self.count = 0
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def wrap(self, texts: Iterator[str]) -> Iterator[str]:
        for text in texts:
            data = text.encode()
            self._hash.update(len(data).to_bytes(8, "little"))  # the digest depends on document boundaries
            self._hash.update(data)
            self.count += 1
            yield text


def _documents(texts: TextStream, limit: int | None) -> Iterator[str]:
    """Yield the first `limit` valid, non-blank texts of the source."""

    def valid_texts() -> Iterator[str]:
        for where, value in texts():
            if not isinstance(value, str):
                raise InputError(f"{where}: the text field holds {type(value).__name__}, not text; fix or remove it")
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"{where}: the text holds half a surrogate pair at character {error.start}, which UTF-8 cannot "
                    "encode; fix or remove it"
                ) from None
            if value.strip():
                yield value

    return islice(valid_texts(), limit)


def _tokenize(
    tokenizer: Any, texts: Sequence[str], ids: range, stop_id: int, max_tokens: int | None
) -> tuple[list[Sample], int]:
    """Tokenize texts; return samples and the number that re-encode to other tokens."""
    samples: list[Sample] = []
    truncated: list[int] = []
    for first, last in text_batches(texts):
        encoding = encode_texts(tokenizer, texts[first:last])
        for i, (text, tokens) in enumerate(zip(texts[first:last], encoding["input_ids"], strict=True)):
            sample_id, reason = ids[first + i], "stop"
            if max_tokens is not None and len(tokens) >= max_tokens:
                text = text[: encoding.token_to_chars(i, max_tokens - 1).end]
                tokens, reason = tokens[:max_tokens], "length"
                truncated.append(first + i)
            else:
                tokens = [*tokens, stop_id]
            samples.append(Sample(sample_id, np.array(tokens, np.int32), text, float("nan"), reason))
    shortened = [samples[i] for i in truncated]
    mismatches = 0
    for first, last in text_batches([sample.text for sample in shortened]):
        encoded = encode_texts(tokenizer, [sample.text for sample in shortened[first:last]])["input_ids"]
        mismatches += sum(
            tokens != sample.tokens.tolist() for tokens, sample in zip(encoded, shortened[first:last], strict=True)
        )
    return samples, mismatches


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> Any:
    """Tokenize texts without added tokens; special strings are plain text."""
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )


def text_batches(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield ranges of texts of about `_ENCODE_CHARACTERS` characters together."""
    first = total = 0
    for i, text in enumerate(texts):
        total += len(text)
        if total >= _ENCODE_CHARACTERS or i == len(texts) - 1:
            yield first, i + 1
            first, total = i + 1, 0


def _open_source(config: ImportCorpusConfig) -> TextStream:
    kind, _, rest = config.source.partition(":")
    if kind == "tfds":
        return _open_tfds(rest, config.split, config.text_field)
    if kind == "datasets":
        return _open_dataset(rest, config)
    path = Path(config.source)
    if path.is_dir():
        return _open_saved_dataset(path, config)
    if not path.is_file():
        raise InputError(
            f"{path}: no such file or folder; give a JSONL file, a `save_to_disk` folder, tfds:FOLDER or datasets:NAME"
        )
    return lambda: _text_fields(path, config.text_field)


def _text_fields(path: Path, text_field: str) -> Iterator[tuple[str, object]]:
    for where, row in read_jsonl(path):
        yield where, _field(row, text_field, where)


def _field(entry: Mapping[str, object], text_field: str, where: str) -> object:
    if text_field not in entry:
        names = ", ".join(map(str, entry)) or "none"
        raise InputError(
            f"{where}: has no field {text_field!r} (its fields: {names}); name the right one with --text-field"
        )
    return entry[text_field]


def _open_saved_dataset(folder: Path, config: ImportCorpusConfig) -> TextStream:
    if (folder / "dataset_info.json").exists() and (folder / "features.json").exists():
        raise InputError(f"{folder}: is a TFDS folder; write tfds:{folder}")
    datasets = _import_datasets(config.source)
    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{folder}: `datasets.load_from_disk` cannot open it ({_first_line(error)})") from error
    if isinstance(found, datasets.DatasetDict):
        if config.split not in found:
            raise InputError(
                f"{folder}: has no split {config.split!r} (it has: {', '.join(found)}); choose with --split"
            )
        found = found[config.split]
    return _dataset_texts(found, config)


def _open_dataset(name: str, config: ImportCorpusConfig) -> TextStream:
    datasets = _import_datasets(config.source)
    path, _, subset = name.partition(":")
    try:
        found = datasets.load_dataset(path, subset or None, split=config.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{config.source}: `datasets.load_dataset` cannot open it ({_first_line(error)})") from error
    return _dataset_texts(found, config)


def _dataset_texts(dataset: Any, config: ImportCorpusConfig) -> TextStream:
    _field(dict.fromkeys(dataset.column_names), config.text_field, config.source)
    column = dataset.select_columns([config.text_field])

    def read() -> Iterator[tuple[str, object]]:
        row = 0
        for batch in column.iter(batch_size=256):
            for value in batch[config.text_field]:
                yield f"{config.source} row {row}", value
                row += 1

    return read


def _import_datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{source}: reading it needs `datasets`; pip install datasets") from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def _open_tfds(folder: str, split: str, text_field: str) -> TextStream:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            f"tfds:{folder}: reading it needs tensorflow-datasets; pip install tensorflow-datasets"
        ) from error
    if not Path(folder, "dataset_info.json").is_file():
        raise InputError(f"tfds:{folder}: not a TFDS folder (no dataset_info.json); give the folder of one version")
    builder = tfds.builder_from_directory(folder)
    if split.partition("[")[0] not in builder.info.splits:
        names = ", ".join(builder.info.splits)
        raise InputError(f"tfds:{folder}: has no split {split!r} (it has: {names}); choose with --split")
    _field(dict.fromkeys(builder.info.features), text_field, f"tfds:{folder}")
    try:
        source = builder.as_data_source(split=split)
    except (ImportError, NotImplementedError, ValueError) as error:
        raise InputError(
            f"tfds:{folder}: {builder.info.file_format.value} files cannot be read here ({_first_line(error)}); "
            "prepare the data set with file_format array_record or parquet"
        ) from error

    def read() -> Iterator[tuple[str, object]]:
        for row in range(len(source)):
            value = source[row][text_field]
            where = f"tfds:{folder} row {row}"
            if isinstance(value, bytes):
                try:
                    value = value.decode()
                except UnicodeDecodeError as error:
                    raise InputError(f"{where}: the text is not UTF-8 ({error.reason}); fix or remove it") from None
            yield where, value

    return read


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
