"""Inputs of a study are hashed by content, whatever their paths."""

from pathlib import Path

import pytest

from jax_selftrain.io.manifest import sha256_file
from jax_selftrain.study.input_hashes import InputHashes


@pytest.mark.parametrize("prefix", ["", "arc:"])
def test_paths_may_have_colons(tmp_path: Path, prefix: str) -> None:
    file = tmp_path / "2026-11-29T10:30" / "a:b.jsonl"
    file.parent.mkdir()
    file.write_text("{}\n")
    assert InputHashes().reference(f"{prefix}{file}") == sha256_file(file)
    assert InputHashes().reference("lambada_openai") == "lambada_openai"
