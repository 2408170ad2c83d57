"""Splits of data sets of the Hugging Face hub.

A reference is `org/name:SPLIT`, `org/name@REVISION:SPLIT`, or `org/name/FOLDER:SPLIT` if the data set has a folder for
each of its configurations. The files are Parquet. They are downloaded one by one: a reader of the first rows downloads
the first file.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jax_selftrain.errors import InputError, summarize_error
from jax_selftrain.hub.model_ref import download_snapshot
from jax_selftrain.io.json_files import hash_json
from jax_selftrain.io.manifest import sha256_file
from jax_selftrain.io.rows import SUFFIXES

_REFERENCE = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<folder>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?:(?P<split>[\w.-]+)"
)
_FILE = re.compile(r".+-(?P<number>\d{5})-of-(?P<count>\d{5})\b.*\.parquet")
_NO_DATASETS = (*SUFFIXES, ".npy", ".gz", ".bin", ".idx")


@dataclass(frozen=True)
class DatasetSplit:
    """A parsed reference."""

    reference: str
    name: str
    folder: str | None
    revision: str | None
    split: str

    @property
    def label(self) -> str:
        """Name of the split in results."""
        return f"{self.folder or self.name.partition('/')[2]}-{self.split}"

    def files(self, limit: int | None = None, *, cached_only: bool = False) -> Iterator[Path]:
        """Yield the files, in order, until they have `limit` rows.

        Nothing is downloaded with `cached_only`. Raises InputError if one cannot be downloaded or read.
        """
        commit, number, count, rows = self.revision, 0, 1, 0
        while number < count and (limit is None or rows < limit):
            path = _download_file(self, commit, number, cached_only)
            yield path
            if limit is not None:
                rows += _count_rows(path)
            match = _FILE.fullmatch(path.name)
            assert match
            count, number = int(match["count"]), number + 1
            commit = next(parent.name for parent in path.parents if parent.parent.name == "snapshots")

    def fingerprint(self, limit: int | None = None, *, cached_only: bool = False) -> str:
        """Hash the content of the files that have the first `limit` rows."""
        return hash_files(tuple(self.files(limit, cached_only=cached_only)))


def parse_dataset_split(reference: str) -> DatasetSplit | None:
    """Parse a reference; None for local files and folders."""
    match = _REFERENCE.fullmatch(reference)
    if match is None or Path(reference).exists() or Path(reference.rpartition(":")[0]).exists():
        return None
    parts = match.groupdict()
    return None if Path(parts["folder"] or parts["name"]).suffix in _NO_DATASETS else DatasetSplit(reference, **parts)


def text_files(reference: str, limit: int | None = None) -> Iterator[Path]:
    """Yield a local file, or the files of a split."""
    split = parse_dataset_split(reference)
    yield from [Path(reference)] if split is None else split.files(limit)


def hash_files(files: tuple[Path, ...]) -> str:
    """Hash the content of files: of one, its SHA-256."""
    hashes = [sha256_file(path) for path in files]
    return hashes[0] if len(hashes) == 1 else hash_json(hashes)


def _count_rows(path: Path) -> int:
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({summarize_error(error)})") from None


@lru_cache(maxsize=1024)
def _download_file(wanted: DatasetSplit, commit: str | None, number: int, cached_only: bool) -> Path:
    """Download one file of a split, or find it in the cache."""
    pattern = f"{wanted.split}-{number:05d}-of-*.parquet"
    patterns = [f"{wanted.folder}/{pattern}"] if wanted.folder else [pattern, f"*/{pattern}"]
    options: Any = {"repo_type": "dataset", "cached_only": cached_only}
    folder = download_snapshot(wanted.reference, wanted.name, commit, patterns, **options)
    found = sorted(path for one in patterns for path in folder.glob(one))
    if len(found) == 1:
        return found[0]
    if found:
        folders = [path.parent.name for path in found]
        choice = f"{wanted.name}/{folders[0]}:{wanted.split}"
        raise InputError(
            f"{wanted.reference}: has this split in the folders {', '.join(folders)}; choose one, as {choice}"
        )
    raise InputError(
        f"{wanted.reference}: has no file {pattern}; check the name of the split, or fill the cache again with `hf "
        f"download {wanted.name} --repo-type dataset`"
    )
