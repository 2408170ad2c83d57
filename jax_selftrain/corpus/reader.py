"""Reader of corpora: checks every checksum, then streams shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jax_selftrain.corpus import shards
from jax_selftrain.corpus.schema import FINISH_REASONS, SCHEMA, Sample, to_samples
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.io.manifest import hash_json

_BATCH_ROWS = 1024
_TYPES = {"start_id": int, "stop_ids": list, "samples": int, "samples_per_shard": int, "tokens": int, "shards": list}


@dataclass(frozen=True)
class Corpus:
    """A complete corpus folder whose checksums were verified."""

    folder: Path
    manifest: Mapping[str, Any]
    """Content of `corpus.json`."""

    def __len__(self) -> int:
        return self.manifest["samples"]

    @property
    def start_id(self) -> int:
        """Token before every document; not in the `tokens` of samples."""
        return self.manifest["start_id"]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a document."""
        return tuple(self.manifest["stop_ids"])

    @property
    def n_tokens(self) -> int:
        """Number of tokens in all documents, without start ids."""
        return self.manifest["tokens"]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest, which holds the checksum of every shard."""
        return hash_json(self.manifest)

    def iter_samples(self) -> Iterator[Sample]:
        """Yield the samples in order of their ids."""
        for batch in self._batches(SCHEMA.names):
            yield from to_samples(batch)

    def token_arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read all tokens into memory.

        Returns:
            tokens int32 [n_tokens], documents concatenated; offsets int64 [N+1], document d being
            tokens[offsets[d]:offsets[d+1]]; finish reasons uint8 [N], indices into `FINISH_REASONS`.
        """
        flat = np.empty(self.n_tokens, np.int32)
        offsets = np.zeros(len(self) + 1, np.int64)
        reasons = np.empty(len(self), np.uint8)
        row = 0
        for batch in self._batches(["tokens", "finish_reason"]):
            lists = batch.column("tokens")
            ends = offsets[row] + np.cumsum(pc.list_value_length(lists).to_numpy(), dtype=np.int64)
            offsets[row + 1 : row + 1 + len(ends)] = ends
            flat[offsets[row] : ends[-1]] = lists.flatten().to_numpy()
            codes = pc.index_in(batch.column("finish_reason"), pa.array(FINISH_REASONS))
            reasons[row : row + len(ends)] = codes.to_numpy()
            row += len(ends)
        return flat, offsets, reasons

    def token_batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (concatenated int32 tokens, int64 lengths) of batches of documents."""
        for batch in self._batches(["tokens"]):
            lists = batch.column("tokens")
            yield lists.flatten().to_numpy(), pc.list_value_length(lists).to_numpy().astype(np.int64)

    def iter_texts(self) -> Iterator[str]:
        """Yield the texts in order of their ids."""
        for batch in self._batches(["text"]):
            yield from batch.column("text").to_pylist()

    def _batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        for shard in self.manifest["shards"]:
            with pq.ParquetFile(self.folder / shard["file"]) as file:
                if not file.schema_arrow.equals(SCHEMA):
                    raise InputError(f"{self.folder / shard['file']}: its columns are not those of a corpus")
                for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                    if batch.num_rows:
                        yield batch


def open_corpus(ref: atomic.PathLike | Corpus, *, tokenizer_fingerprint: str | None = None) -> Corpus:
    """Open a corpus folder and verify its manifest and shards.

    Args:
        ref: the corpus folder, or what `open_corpus` returned, which is not verified again.
        tokenizer_fingerprint: the expected `ModelRef.tokenizer_fingerprint`; None accepts any.

    Raises:
        InputError: the folder is absent, not a corpus, incomplete or empty, or of another tokenizer; or a shard is
            missing or damaged.
    """
    corpus = ref if isinstance(ref, Corpus) else _read_corpus(Path(ref))
    found = corpus.manifest["tokenizer_fingerprint"]
    if tokenizer_fingerprint is not None and found != tokenizer_fingerprint:
        raise InputError(
            f"{corpus.folder}: its tokens come from another tokenizer (corpus {found[:8]}…, model "
            f"{tokenizer_fingerprint[:8]}…); retokenize it for the model, or import its text again"
        )
    return corpus


def _read_corpus(folder: Path) -> Corpus:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such corpus folder; make it with `jax-selftrain sample`")
    if not (folder / shards.MANIFEST).is_file():
        if (folder / shards.REQUEST).exists() or any(folder.glob("shard-*.parquet")):
            raise InputError(shards.missing_shards_message(folder))
        raise InputError(
            f"{folder}: not a corpus folder (it has no {shards.MANIFEST}); give the folder that was sampled"
        )
    manifest = atomic.read_json(folder / shards.MANIFEST)
    _check_manifest(folder / shards.MANIFEST, manifest)
    shards.check_shards(folder, manifest["shards"])
    return Corpus(folder, manifest)


def _check_manifest(path: Path, manifest: Any) -> None:
    if not isinstance(manifest, dict) or manifest.get("format") != shards.FORMAT:
        raise InputError(f"{path}: not the manifest of a corpus")
    if manifest.get("version") != shards.VERSION:
        raise InputError(
            f"{path}: corpus format {manifest.get('version')!r}, this program reads {shards.VERSION}; delete the "
            "folder and run the command that created it again"
        )
    remedy = f"delete {path.name} and run the command that created it again"
    for key in (*shards.REQUEST_KEYS, "tokens", "shards"):
        if key not in manifest:
            raise InputError(f"{path}: {key!r} is missing; {remedy}")
        if not isinstance(manifest[key], _TYPES.get(key, object)):
            raise InputError(f"{path}: {key!r} is damaged; {remedy}")
    listed, total = manifest["shards"], manifest["samples"]
    if not all(isinstance(shard, dict) and shard.keys() >= set(shards.SHARD_RECORD_KEYS) for shard in listed):
        raise InputError(f"{path}: its list of shards is damaged; {remedy}")
    if not listed or total < 1:
        raise InputError(f"{path.parent}: the corpus is empty; sample or import at least one document")
    counts = [(shard["rows"], shard["tokens"]) for shard in listed]
    if (sum(rows for rows, _ in counts), sum(tokens for _, tokens in counts)) != (total, manifest["tokens"]):
        raise InputError(
            f"{path}: its shards do not add up to its {total} samples and {manifest['tokens']} tokens; {remedy}"
        )
