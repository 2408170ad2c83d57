"""Writer of corpora: shards in any order, then the manifest.

A shard holds a fixed range of sample ids and is the unit of work, restart and repair. Its Parquet file is committed
first, then its record (`records/shard-000000.json`); a shard is done when both exist. Parquet bytes depend on the
samples and the pyarrow version alone. `corpus.json` is assembled from the records and holds only what does not depend
on meshes and restarts; the rest (mesh, seconds) stays in the records.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq

from jax_selftrain.corpus.reader import (
    FIX_HINT,
    FORMAT,
    MANIFEST,
    REQUEST,
    SHARD_KEYS,
    VERSION,
    Corpus,
    check_shards_exist,
    shard_names,
)
from jax_selftrain.corpus.schema import Sample, to_table
from jax_selftrain.corpus.statistics import corpus_statistics
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic, json_files
from jax_selftrain.io.manifest import sha256_file, verify_checksums
from jax_selftrain.version import versions

_ROW_GROUP = 1024
# With this card `datasets.load_dataset(FOLDER)` reads only the shards, locally and on the hub.
_CARD = """\
---
configs:
- config_name: default
  data_files: shard-*.parquet
---
{samples} texts ({kind}); `corpus.json` describes their origin.
"""

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class CorpusWriter:
    """A corpus folder that is being written, by one or several processes."""

    folder: Path
    request: Mapping[str, Any]
    """Plain data that determines the content: `reader.REQUEST_KEYS`, without meshes and times."""

    @classmethod
    def open(cls, folder: atomic.PathLike, request: Mapping[str, Any]) -> "CorpusWriter":
        """Create or resume a corpus; its first shard makes the folder.

        Temporary files of killed processes and the records of deleted shards are removed. The stored request is used:
        it may differ from `request` in `source.ref` alone, because models and files may move.

        Raises:
            InputError: the folder holds another request; the message names the first difference.
        """
        folder = Path(folder)
        for path in (folder, folder / "records"):
            atomic.remove_stale_temp_files(path)
        # Looked for first, because another process may write its request and a shard just now.
        has_shards = (folder / MANIFEST).exists() or any(folder.glob("shard-*.parquet"))
        if not (folder / REQUEST).exists():
            if has_shards:
                raise InputError(f"{folder}: holds shards but no {REQUEST}; choose another folder")
            return cls(folder, dict(request))
        before = json_files.read_json(folder / REQUEST)
        if difference := first_mismatch(before, dict(request)):
            raise InputError(
                f"{folder}: was created with {difference[0]} = {difference[1]!r}, this command has "
                f"{difference[2]!r}; choose another folder, or delete this one to start over"
            )
        for record in folder.glob("records/shard-*.json"):
            if not (folder / f"{record.stem}.parquet").exists():
                record.unlink(missing_ok=True)
        return cls(folder, before)

    @cached_property
    def shards(self) -> list[str]:
        """File names of all shards: shard-000000.parquet, …."""
        return shard_names(self.request["samples"], self.request["samples_per_shard"])

    def sample_ids(self, index: int) -> range:
        """Return the sample ids of a shard."""
        size = self.request["samples_per_shard"]
        return range(index * size, min((index + 1) * size, self.request["samples"]))

    def record_path(self, index: int) -> Path:
        """Return the path of a shard's record."""
        return self.folder / "records" / f"{Path(self.shards[index]).stem}.json"

    def is_done(self, index: int) -> bool:
        """Return True if a shard and its record exist."""
        return (self.folder / self.shards[index]).exists() and self.record_path(index).exists()

    def missing(self) -> list[int]:
        """Return the indices of shards that are not done, ascending."""
        return [index for index in range(len(self.shards)) if not self.is_done(index)]

    def write_shard(self, index: int, samples: Sequence[Sample], record: Mapping[str, Any]) -> dict[str, Any]:
        """Commit a shard, then its record.

        Args:
            index: index of the shard.
            samples: its samples, with the ids `sample_ids(index)`.
            record: plain data for the record. `mismatches` (samples whose re-encoded text differs from their tokens)
                also enters `corpus.json`. `policy_logprob` (sum over the samples of their log-probability under the
                sampling distribution, in nats; absent for text that was not sampled) enters its `statistics`.

        Returns:
            The record as written, with file, sha256, bytes, rows, tokens, first_sample_id and versions.

        Raises:
            ValueError: the samples have other ids.
            InputError: the folder holds another corpus now, or the disk is full or not writable; no partial file
                remains.
        """
        if [sample.sample_id for sample in samples] != list(self.sample_ids(index)):
            raise ValueError(f"shard {index}: its samples should have the ids {self.sample_ids(index)}")
        self.open(self.folder, self.request)
        if not (self.folder / REQUEST).exists():
            json_files.write_json(self.folder / REQUEST, self.request)
        path = self.folder / self.shards[index]
        self.record_path(index).unlink(missing_ok=True)  # the old record does not describe the new bytes
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
            "versions": versions(),
            **record,
            "file": path.name,
            "sha256": sha256_file(path),
            "bytes": path.stat().st_size,
            "rows": len(samples),
            "tokens": sum(len(sample.tokens) for sample in samples),
            "first_sample_id": samples[0].sample_id,
        }
        json_files.write_json(self.record_path(index), written)
        return written

    def copy_shards(self, folder: atomic.PathLike) -> None:
        """Copy the missing shards that a corpus with fewer samples has undamaged.

        Raises:
            InputError: there is no such corpus, or it differs in more than the number of samples; the message names the
                difference.
        """
        folder = Path(folder)
        request = json_files.read_json(folder / REQUEST)
        if difference := first_mismatch({**request, "samples": self.request["samples"]}, dict(self.request)):
            raise InputError(
                f"{folder}: was created with {difference[0]} = {difference[1]!r}, this command has "
                f"{difference[2]!r}; it cannot be extended"
            )
        shorter = CorpusWriter(folder, request)
        for index in self.missing():
            if index >= len(shorter.shards) or shorter.sample_ids(index) != self.sample_ids(index):
                return
            if not shorter.is_done(index):
                continue
            name, record = self.shards[index], json_files.read_json(shorter.record_path(index))
            if sha256_file(folder / name) != record["sha256"]:
                continue
            if not (self.folder / REQUEST).exists():
                json_files.write_json(self.folder / REQUEST, self.request)
            with atomic.commit_file(self.folder / name) as aside:
                shutil.copyfile(folder / name, aside)
            json_files.write_json(self.record_path(index), record)

    def convert_missing(
        self, items: Iterable[_Item], convert: Callable[[list[_Item], range], tuple[list[Sample], Mapping[str, int]]]
    ) -> None:
        """Write the missing shards from a stream with one item a sample.

        Args:
            items: the items of all samples, in order; consumed up to the last missing shard.
            convert: convert the items of some sample ids; return samples and counts for the record.
        """
        stream, position = iter(items), 0
        for index in self.missing():
            ids = self.sample_ids(index)
            samples, counts = convert(list(islice(stream, ids.start - position, ids.stop - position)), ids)
            self.write_shard(index, samples, counts)
            position = ids.stop

    def records(self) -> list[dict[str, Any]]:
        """Read the records of all shards.

        Raises:
            InputError: a shard or its record is missing, or a record is damaged or of another range of samples.
        """
        check_shards_exist(self.folder, self.shards)
        records = []
        for index in range(len(self.shards)):
            path, ids = self.record_path(index), self.sample_ids(index)
            record = json_files.read_json(path)
            if not isinstance(record, dict) or not {*SHARD_KEYS, "first_sample_id"} - {"mismatches"} <= record.keys():
                raise InputError(f"{path}: not the record of a shard; {FIX_HINT}")
            if (record["first_sample_id"], record["rows"]) != (ids.start, len(ids)):
                raise InputError(
                    f"{path}: holds {record['rows']} samples from id {record['first_sample_id']} where this corpus has "
                    f"{len(ids)} from id {ids.start}; {FIX_HINT}"
                )
            records.append({"mismatches": 0} | record)
        return records

    def finalize(self, facts: Mapping[str, Any] | None = None) -> Corpus:
        """Verify every shard, compute `corpus_statistics` and commit `corpus.json`.

        Args:
            facts: plain data for `corpus.json` besides the request.

        Raises:
            InputError: a shard is missing, damaged or of another corpus.
        """
        records = self.records()
        if strays := {path.name for path in self.folder.glob("shard-*.parquet")} - set(self.shards):
            raise InputError(
                f"{self.folder / min(strays)}: does not belong to this corpus of {len(records)} shards; delete it"
            )
        verify_checksums(self.folder, dict(zip(self.shards, records, strict=True)), fix_hint=FIX_HINT)
        manifest = {
            **self.request,
            **(facts or {}),
            "format": FORMAT,
            "version": VERSION,
            "tokens": sum(record["tokens"] for record in records),
            "retokenization_mismatches": sum(record["mismatches"] for record in records),
            "shards": [{key: record[key] for key in SHARD_KEYS} for record in records],
        }
        policy_logprobs = [record.get("policy_logprob") for record in records]
        manifest["statistics"] = corpus_statistics(Corpus(self.folder, manifest), policy_logprobs)
        atomic.write_text(self.folder / "README.md", _CARD.format(**manifest))
        json_files.write_json(self.folder / MANIFEST, manifest)
        for path in (self.folder / "records").glob("*.lease"):  # of a process that died after it wrote its shard
            path.unlink(missing_ok=True)
        return Corpus(self.folder, manifest)


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
