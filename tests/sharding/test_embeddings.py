"""Text embeddings equal those of transformers, from a checkpoint without a head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from models_factory import tiny_texts
from safetensors.numpy import load_file, save_file

from jax_selftrain.errors import InputError
from jax_selftrain.evals import embed_texts
from jax_selftrain.hub import load_model
from jax_selftrain.study.proxies import semantic_similarities

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


@pytest.mark.parametrize("mesh", ["data=1", pytest.param("data=2,model=2", marks=pytest.mark.nightly)])
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


def test_an_embedding_does_not_depend_on_the_other_texts(body: Path) -> None:
    model = load_model(body, "data=1")
    together, alone = embed_texts(model, TEXTS), [embed_texts(model, [text])[0] for text in TEXTS]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-6)
    assert embed_texts(model, []).shape == (0, 64)


def test_similarity_is_the_cosine_of_mean_embeddings(body: Path) -> None:
    model, others = load_model(body, "data=1"), list(tiny_texts(5, seed=9))
    assert semantic_similarities(model, TEXTS, {"same": TEXTS[::-1]})[0] == pytest.approx(1)
    one, other = (embed_texts(model, side).astype(np.float64).mean(axis=0) for side in (TEXTS, others))
    cosine = one @ other / np.sqrt((one @ one) * (other @ other))
    whole, by_task = semantic_similarities(model, TEXTS, {"a": others[:2], "b": [*others[2:], " "], "none": []})
    assert whole == pytest.approx(cosine, abs=1e-9)
    first = embed_texts(model, others[:2]).astype(np.float64).sum(axis=0)
    assert by_task["a"] == pytest.approx(one @ first / np.sqrt((one @ one) * (first @ first)), abs=1e-9)
    assert by_task["none"] is None
    assert semantic_similarities(model, ["  "], {"a": others}) == (None, {"a": None})


def test_a_model_without_a_tokenizer_cannot_embed(body: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((body / name).read_bytes())
    with pytest.raises(InputError, match="has no tokenizer"):
        embed_texts(load_model(tmp_path, "data=1"), ["text"])
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen3"
