"""Tests of `embeddings` on several devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from models_factory import tiny_texts
from safetensors.numpy import load_file, save_file

from jax_selftrain.evals import embed_texts
from jax_selftrain.hub import load_model

TEXTS = [*tiny_texts(6), "a", " ".join(tiny_texts(40, seed=1))]


@pytest.fixture(scope="module")
def body(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 checkpoint without head and without the prefix `model.`."""
    whole, folder = tiny_model("qwen3", tie_word_embeddings=True), tmp_path_factory.mktemp("body")
    for path in whole.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(whole / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    assert len(bare.keys() & tensors.keys()) == 0
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("mesh", ["data=1", "data=2,model=2"])
def test_embeddings_equal_those_of_transformers(body: Path, mesh: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModel, AutoTokenizer

    found = embed_texts(load_model(body, mesh), TEXTS)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    reference, tokenizer = AutoModel.from_pretrained(body, dtype=torch.float32), AutoTokenizer.from_pretrained(body)
    with torch.no_grad():
        for text, vector in zip(TEXTS, found, strict=True):
            ids = tokenizer(text, truncation=True, max_length=512, return_tensors="pt")["input_ids"]
            last = reference(ids).last_hidden_state[0, -1].numpy()
            np.testing.assert_allclose(vector, last / np.linalg.norm(last), atol=1e-5)
