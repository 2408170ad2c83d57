"""Reader of corpora: checks every checksum, then streams shards."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jax_selftrain.corpus.schema import FINISH_REASONS, SCHEMA, Sample, to_samples
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic, json_files
from jax_selftrain.io.json_files import hash_json
from jax_selftrain.io.manifest import read_manifest, verify_checksums

FORMAT, VERSION = "jax-selftrain corpus", 2
MANIFEST, REQUEST = "corpus.json", "request.json"
FIX_HINT = "delete the shard and run the same command to regenerate it"
REQUEST_KEYS = {
    "kind": object,
    "source": object,
    "tokenizer_fingerprint": object,
    "start_id": int,
    "stop_ids": list,
    "policy": object,
    "seed": object,
    "samples": int,
    "samples_per_shard": int,
}
"""Keys of `request.json`, which determine the content of a corpus, and their types in `corpus.json`."""
SHARD_KEYS = ("file", "sha256", "bytes", "rows", "tokens", "mismatches")

_COMPLETE = "run the command that created it again to complete it"
_BATCH_ROWS = 1024
_MAX_SHARDS = 1_000_000


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
    def n_tokens(self) -> int:
        """Number of tokens in all documents, without start ids."""
        return self.manifest["tokens"]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest, which holds the checksum of every shard.

        The path or name of the source does not count; its fingerprint does.
        """
        source = self.manifest["source"]
        content = {key: value for key, value in source.items() if key != "ref"} if isinstance(source, dict) else source
        return hash_json({**self.manifest, "source": content})

    def iter_samples(self) -> Iterator[Sample]:
        """Yield the samples in order of their ids."""
        for batch in self.batches(SCHEMA.names):
            yield from to_samples(batch)

    def iter_texts(self) -> Iterator[str]:
        """Yield the texts in order of their ids."""
        for batch in self.batches(["text"]):
            yield from batch.column("text").to_pylist()

    def to_pandas(self) -> Any:
        """Return a DataFrame with a row for each sample."""
        return pa.Table.from_batches(self.batches(SCHEMA.names), SCHEMA).to_pandas()

    def token_arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read all tokens into memory.

        Returns:
            tokens int32 [n_tokens], documents concatenated; offsets int64 [N+1], document d being
            tokens[offsets[d]:offsets[d+1]]; finish reasons uint8 [N], indices into `FINISH_REASONS`.
        """
        flat, end = np.empty(self.n_tokens, np.int32), 0
        lengths, reasons = [np.zeros(1, np.int64)], []
        for batch in self.batches(["tokens", "finish_reason"]):
            tokens, batch_lengths = batch_tokens(batch)
            flat[end : end + len(tokens)] = tokens
            end += len(tokens)
            lengths.append(batch_lengths)
            codes = pc.index_in(batch.column("finish_reason"), pa.array(FINISH_REASONS))
            reasons.append(codes.to_numpy().astype(np.uint8))
        return flat, np.cumsum(np.concatenate(lengths)), np.concatenate(reasons)

    def token_batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (concatenated int32 tokens, int64 lengths) of batches of documents."""
        return map(batch_tokens, self.batches(["tokens"]))

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield columns of `SCHEMA`, some rows at a time."""
        for shard in self.manifest["shards"]:
            with pq.ParquetFile(self.folder / shard["file"]) as file:
                if not file.schema_arrow.equals(SCHEMA):
                    raise InputError(f"{self.folder / shard['file']}: its columns are not those of a corpus")
                yield from (batch for batch in file.iter_batches(_BATCH_ROWS, columns=columns) if batch.num_rows)


def batch_tokens(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """Return the concatenated tokens and the lengths of a batch's documents."""
    lists = batch.column("tokens")
    return lists.flatten().to_numpy(), pc.list_value_length(lists).to_numpy().astype(np.int64)


def open_corpus(ref: atomic.PathLike | Corpus, *, tokenizer_fingerprint: str | None = None) -> Corpus:
    """Open a corpus folder and verify its manifest and shards.

    Args:
        ref: the corpus folder, or what `open_corpus` returned, which is not verified again.
        tokenizer_fingerprint: the expected `ModelRef.tokenizer_fingerprint`; None accepts any.

    Raises:
        InputError: the folder is absent, not a corpus, incomplete or empty, or of another tokenizer; or a shard is
            missing or damaged.
    """
    corpus = ref if isinstance(ref, Corpus) else Corpus(Path(ref), _read_manifest(Path(ref)))
    found = corpus.manifest["tokenizer_fingerprint"]
    if tokenizer_fingerprint is not None and found is None:
        raise InputError(
            f"{corpus.folder}: was sampled from a model without a tokenizer, so its tokens have no text; add the "
            "tokenizer to that model, and sample it again"
        )
    if tokenizer_fingerprint is not None and found != tokenizer_fingerprint:
        raise InputError(
            f"{corpus.folder}: its tokens come from another tokenizer (corpus {found[:8]}…, model "
            f"{tokenizer_fingerprint[:8]}…); retokenize it for the model, or import its text again"
        )
    return corpus


def shard_names(samples: int, samples_per_shard: int) -> list[str]:
    """Return the file names of the shards of a corpus."""
    if (count := math.ceil(samples / samples_per_shard)) > _MAX_SHARDS:
        raise InputError(
            f"--samples {samples}: makes {count:,} shards of {samples_per_shard:,}, more than {_MAX_SHARDS:,}; use "
            "fewer samples, or a larger --samples-per-shard"
        )
    return [f"shard-{index:06d}.parquet" for index in range(math.ceil(samples / samples_per_shard))]


def check_shards_exist(folder: Path, shards: Sequence[str]) -> None:
    """Raise InputError if shard files are missing; names the first three."""
    if missing := [name for name in shards if not (folder / name).is_file()]:
        verb = "is" if len(missing) == 1 else "are"
        names = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise InputError(
            f"{folder}: incomplete corpus, {len(missing)} of {len(shards)} shards {verb} missing ({names}); {_COMPLETE}"
        )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if folder.is_file():
        raise InputError(
            f"{folder}: is a file, not a corpus folder; make a corpus of it with `jax-selftrain import {folder} "
            "--model MODEL --out CORPUS`"
        )
    if not folder.is_dir():
        raise InputError(f"{folder}: no such corpus folder; make it with `jax-selftrain sample` or `import`")
    if not path.is_file():
        if not (folder / REQUEST).exists():
            raise InputError(f"{folder}: not a corpus folder (it has no {MANIFEST}); give the folder that was sampled")
        request = json_files.read_json(folder / REQUEST)
        check_shards_exist(folder, shard_names(request["samples"], request["samples_per_shard"]))
        raise InputError(f"{folder}: incomplete corpus, {MANIFEST} is missing; {_COMPLETE}")
    remedy = f"delete {path.name} and run the command that created it again"
    manifest = read_manifest(path, FORMAT, VERSION, {**REQUEST_KEYS, "tokens": int, "shards": list}, remedy=remedy)
    shards = manifest["shards"]
    if not all(isinstance(shard, dict) and shard.keys() >= set(SHARD_KEYS) for shard in shards):
        raise InputError(f"{path}: its list of shards is damaged; {remedy}")
    if not shards or manifest["samples"] < 1:
        raise InputError(f"{folder}: the corpus is empty; sample or import at least one document")
    if [sum(shard[key] for shard in shards) for key in ("rows", "tokens")] != [manifest["samples"], manifest["tokens"]]:
        raise InputError(
            f"{path}: its shards do not add up to its {manifest['samples']} samples and {manifest['tokens']} tokens; "
            f"{remedy}"
        )
    check_shards_exist(folder, [shard["file"] for shard in shards])
    verify_checksums(folder, {shard["file"]: shard for shard in shards}, fix_hint=FIX_HINT)
    return manifest
