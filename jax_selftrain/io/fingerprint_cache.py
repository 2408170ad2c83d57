"""What comes into a study from outside, by its content: models, tokenizers, texts, tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jax_selftrain import hub
from jax_selftrain.io.manifest import hash_json, sha256_file


class FingerprintCache:
    """Fingerprints of what comes from outside, each worked out once."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], str] = {}

    def _once(self, kind: str, ref: str, find: Callable[[str], str]) -> str:
        if (kind, ref) not in self._found:
            self._found[kind, ref] = find(ref)
        return self._found[kind, ref]

    def model(self, ref: str) -> str:
        return self._once("model", ref, lambda ref: hub.open_model(ref).fingerprint)

    def tokenizer(self, ref: str) -> str:
        return self._once("tokenizer", ref, lambda ref: hub.open_model(ref).tokenizer_fingerprint)

    def text(self, source: str) -> str:
        """Of a JSONL file by its bytes; of what another library opens, by its name: its import hashes the texts."""
        return self._once("text", source, lambda ref: sha256_file(ref) if Path(ref).is_file() else ref)

    def eval_files(self, reference: str) -> str:
        """Return the hash of a task file (`LAYOUT:FILE`), task folder or text file, or the name of a named task."""
        path = Path(reference.partition(":")[2] if ":" in reference else reference)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in (".jsonl", ".yaml", ".yml", ".py"))
            return hash_json([self._once("file", str(file), sha256_file) for file in files])
        return self._once("file", str(path), sha256_file) if path.is_file() else reference
