"""Fingerprints of the texts and task files that a study reads."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from jax_selftrain.io.manifest import hash_json, sha256_file


class FingerprintCache:
    """Fingerprints of files, each computed once for one study."""

    def __init__(self) -> None:
        self._hash = lru_cache(maxsize=None)(sha256_file)

    def text(self, source: str) -> str:
        """Hash a JSONL file; return the name of a data set."""
        return self._hash(source) if Path(source).is_file() else source

    def eval_files(self, reference: str) -> str:
        """Hash a file, `LAYOUT:FILE` or folder; return a task name."""
        path = Path(reference.partition(":")[2] if ":" in reference else reference)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in (".jsonl", ".yaml", ".yml", ".py"))
            return hash_json([self._hash(str(file)) for file in files])
        return self._hash(str(path)) if path.is_file() else reference
