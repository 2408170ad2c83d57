"""Writer of corpora: shards in any order, then the manifest.

A shard holds a fixed range of sample ids and is the unit of work, restart and repair. Its Parquet file is committed
first, then its record (`records/shard-000000.json`); a shard is done when both exist. Parquet bytes depend on the
samples and the pyarrow version alone. `corpus.json` is assembled from the records and holds only what does not depend
on meshes and restarts; the rest (mesh, seconds) stays in the records.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jax_selftrain.corpus.schema import Sample, to_table
from jax_selftrain.corpus.statistics import corpus_statistics
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.io.manifest import sha256_file, verify_checksums

FORMAT = "jax-selftrain corpus"
VERSION = 2
MANIFEST = "corpus.json"
REQUEST = "request.json"
FIX_HINT = "delete the shard and run the same command to regenerate it"

_ROW_GROUP = 1024
SHARD_RECORD_KEYS = ("file", "sha256", "bytes", "rows", "tokens", "mismatches")
REQUEST_KEYS = (
    "kind",
    "source",
    "tokenizer_fingerprint",
    "start_id",
    "stop_ids",
    "policy",
    "seed",
    "samples",
    "samples_per_shard",
)
"""Keys of `corpus.json` that the caller of `finalize_corpus` supplies."""


# With this card `datasets.load_dataset(FOLDER)` reads only the shards, locally and on the hub.
_CARD = """\
---
configs:
- config_name: default
  data_files: shard-*.parquet
---
{samples} texts ({kind}); `corpus.json` describes their origin.
"""


def shard_name(index: int) -> str:
    """Return the file name of a shard: `shard-000000.parquet`."""
    return f"shard-{index:06d}.parquet"


def shard_ids(index: int, samples: int, samples_per_shard: int) -> range:
    """Return the sample ids of a shard."""
    return range(index * samples_per_shard, min((index + 1) * samples_per_shard, samples))


def shard_count(samples: int, samples_per_shard: int) -> int:
    """Return the number of shards of a corpus."""
    return math.ceil(samples / samples_per_shard)


def init_corpus(folder: atomic.PathLike, request: Mapping[str, Any]) -> dict[str, Any]:
    """Create or resume a corpus; its request is stored in `request.json`.

    Temporary files of killed processes and the records of deleted shards are removed.

    Args:
        folder: the corpus folder; created if missing.
        request: plain data that determines the content (source, tokenizer, policy, seed, …), without meshes and times.

    Returns:
        The stored request. It may differ from `request` in `source.ref` alone, because models and files may move.

    Raises:
        InputError: the folder holds another request; the message names the first difference.
    """
    folder = Path(folder)
    atomic.remove_stale_temp_files(folder)
    atomic.remove_stale_temp_files(folder / "records")
    path = folder / REQUEST
    if path.exists():
        before = atomic.read_json(path)
        difference = first_mismatch(before, dict(request))
        if difference:
            raise InputError(
                f"{folder}: was created with {difference[0]} = {difference[1]!r}, this command has "
                f"{difference[2]!r}; choose another folder, or delete this one to start over"
            )
        for record in folder.glob("records/shard-*.json"):
            if not (folder / f"{record.stem}.parquet").exists():
                record.unlink(missing_ok=True)
        return before
    if (folder / MANIFEST).exists() or any(folder.glob("shard-*.parquet")):
        raise InputError(f"{folder}: holds shards but no {REQUEST}; choose another folder")
    atomic.write_json(path, dict(request))
    return dict(request)


def write_shard(
    folder: atomic.PathLike, index: int, samples: Sequence[Sample], record: Mapping[str, Any]
) -> dict[str, Any]:
    """Commit a shard, then its record.

    Args:
        folder: the corpus folder.
        index: index of the shard.
        samples: its samples, with consecutive ids.
        record: plain data for the record. `mismatches` (samples whose re-encoded text differs from their tokens) also
            enters `corpus.json`. `policy_logprob` (sum over the samples of their log-probability under the sampling
            distribution, in nats; absent for text that was not sampled) enters its `statistics`.

    Returns:
        The record as written: `record` and file, sha256, bytes, rows, tokens, first_sample_id.

    Raises:
        ValueError: no samples, or ids with gaps.
        InputError: the disk is full or not writable; no partial file remains.
    """
    if not samples:
        raise ValueError(f"shard {index} has no samples")
    first = samples[0].sample_id
    if [sample.sample_id for sample in samples] != list(range(first, first + len(samples))):
        raise ValueError(f"shard {index}: sample ids are not consecutive")
    folder = Path(folder)
    path = folder / shard_name(index)
    _record_path(folder, index).unlink(missing_ok=True)  # the old record does not describe the new bytes
    with atomic.commit_file(path) as aside:
        pq.write_table(
            to_table(samples),
            aside,
            version="2.6",
            data_page_version="1.0",
            compression="zstd",
            compression_level=3,
            use_dictionary=["tokens.list.element", "finish_reason"],
            row_group_size=_ROW_GROUP,
        )
    written = {
        **record,
        "file": path.name,
        "sha256": sha256_file(path),
        "bytes": path.stat().st_size,
        "rows": len(samples),
        "tokens": sum(len(sample.tokens) for sample in samples),
        "first_sample_id": first,
    }
    atomic.write_json(_record_path(folder, index), written)
    return written


def read_records(folder: atomic.PathLike) -> dict[int, dict[str, Any]]:
    """Return {shard index: record} of all committed shards.

    Raises:
        InputError: a record is damaged.
    """
    folder = Path(folder)
    records = {}
    for path in sorted(folder.glob("records/shard-*.json")):
        record = atomic.read_json(path)
        if not isinstance(record, dict) or not {"file", "sha256", "bytes", "rows", "tokens"} <= record.keys():
            raise InputError(f"{path}: not the record of a shard; {FIX_HINT}")
        index = int(path.stem.removeprefix("shard-"))
        if (folder / shard_name(index)).exists():
            records[index] = record
    return records


def is_shard_done(folder: atomic.PathLike, index: int) -> bool:
    """Return True if a shard and its record exist."""
    return Path(folder, shard_name(index)).exists() and _record_path(Path(folder), index).exists()


def missing_shards(folder: atomic.PathLike, n_shards: int) -> list[int]:
    """Return the indices of shards that are not done, ascending."""
    return [index for index in range(n_shards) if not is_shard_done(folder, index)]


def finalize_corpus(folder: atomic.PathLike, manifest: Mapping[str, Any]) -> None:
    """Verify every shard, compute `corpus_statistics` and commit `corpus.json`.

    Args:
        folder: the corpus folder, with all shards.
        manifest: the `REQUEST_KEYS` (kind, source {ref, fingerprint}, tokenizer_fingerprint, …); other data is kept.

    Raises:
        InputError: there are no samples, or a shard is missing, damaged or of another corpus.
        ValueError: a key of the manifest is missing.
    """
    folder = Path(folder)
    if absent := [key for key in REQUEST_KEYS if key not in manifest]:
        raise ValueError(f"the manifest lacks {absent}")
    samples, per_shard = manifest["samples"], manifest["samples_per_shard"]
    if samples < 1:
        raise InputError(f"{folder}: the corpus would be empty; give it at least one document")
    n_shards = shard_count(samples, per_shard)
    if missing := missing_shards(folder, n_shards):
        raise InputError(_incomplete(folder, missing, n_shards))
    records = read_records(folder)
    expected = {shard_name(index) for index in range(n_shards)}
    if strays := sorted(path.name for path in folder.glob("shard-*.parquet") if path.name not in expected):
        raise InputError(f"{folder / strays[0]}: does not belong to this corpus of {n_shards} shards; delete it")
    for index in range(n_shards):
        ids = shard_ids(index, samples, per_shard)
        found = (records[index].get("first_sample_id"), records[index]["rows"])
        if found != (ids.start, len(ids)):
            raise InputError(
                f"{folder / shard_name(index)}: holds {found[1]} samples from id {found[0]} where this corpus has "
                f"{len(ids)} from id {ids.start}; {FIX_HINT}"
            )
    shards = [{"mismatches": 0} | records[index] for index in range(n_shards)]
    check_shards(folder, shards)
    atomic.write_text(folder / "README.md", _CARD.format(**manifest))
    atomic.write_json(
        folder / MANIFEST,
        {
            **manifest,
            "format": FORMAT,
            "version": VERSION,
            "tokens": sum(shard["tokens"] for shard in shards),
            "retokenization_mismatches": sum(shard["mismatches"] for shard in shards),
            "statistics": corpus_statistics(folder, shards),
            "shards": [{key: shard[key] for key in SHARD_RECORD_KEYS} for shard in shards],
        },
    )


def check_shards(folder: atomic.PathLike, shards: Sequence[Mapping[str, Any]]) -> None:
    """Verify the checksum of every shard.

    Raises:
        InputError: a shard is missing or damaged; the sentence names the first and its remedy.
    """
    folder = Path(folder)
    if gone := [index for index, shard in enumerate(shards) if not (folder / shard["file"]).is_file()]:
        raise InputError(_incomplete(folder, gone, len(shards)))
    verify_checksums(folder, {shard["file"]: shard for shard in shards}, fix_hint=FIX_HINT)


def missing_shards_message(folder: atomic.PathLike) -> str:
    """Return the error sentence for a folder without `corpus.json`."""
    folder = Path(folder)
    request = atomic.read_json(folder / REQUEST) if (folder / REQUEST).exists() else {}
    samples, per_shard = (request.get(key) for key in ("samples", "samples_per_shard"))
    if samples and per_shard:
        n_shards = shard_count(samples, per_shard)
        if missing := missing_shards(folder, n_shards):
            return _incomplete(folder, missing, n_shards)
    return (
        f"{folder}: incomplete corpus, {len(read_records(folder))} shards exist but {MANIFEST} is missing; "
        "run the command that created it again to complete it"
    )


def _incomplete(folder: Path, missing: Sequence[int], n_shards: int) -> str:
    verb = "is" if len(missing) == 1 else "are"
    names = ", ".join(shard_name(index) for index in missing[:3]) + (", …" if len(missing) > 3 else "")
    return (
        f"{folder}: incomplete corpus, {len(missing)} of {n_shards} shards {verb} missing ({names}); "
        "run the command that created it again to complete it"
    )


def _record_path(folder: Path, index: int) -> Path:
    return folder / "records" / f"shard-{index:06d}.json"


def first_mismatch(before: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Return (name, before, now) of the first difference, except `source.ref`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            path = f"{name}.{key}" if name else key
            if path != "source.ref" and (found := first_mismatch(before.get(key), now.get(key), path)):
                return found
        return None
    before, now = ([*value] if isinstance(value, tuple) else value for value in (before, now))
    return None if before == now else (name, before, now)
