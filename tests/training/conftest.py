"""Fixtures: a tiny corpus and run options for it."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from models_factory import tiny_texts
from training_runs import run_options

from jax_selftrain.config import ImportCorpusConfig, TrainConfig
from jax_selftrain.corpus import import_text


@pytest.fixture(scope="session")
def small_model(tiny_model) -> Path:
    """A Llama that compiles and trains in seconds."""
    return tiny_model(
        "llama", hidden_size=32, intermediate_size=48, num_key_value_heads=4, num_hidden_layers=1, vocab_size=320
    )


def make_corpus(folder: Path, model: Path, texts: list[str]) -> Path:
    """Make a corpus of texts, tokenized for `model`, in `folder/corpus`."""
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    import_text(ImportCorpusConfig(source=str(source), model=str(model), out=str(folder / "corpus")))
    return folder / "corpus"


@pytest.fixture(scope="session")
def corpus_folder(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beginnings of sixty stories, tokenized for `small_model`."""
    texts = [text[: 40 + 37 * i % 80] for i, text in enumerate(tiny_texts(60, seed=7))]  # of many lengths
    return make_corpus(tmp_path_factory.mktemp("corpus"), small_model, texts)


@pytest.fixture(scope="session")
def other_corpus(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beginnings of twelve other stories, for mixtures."""
    texts = [text[:90] for text in tiny_texts(12, seed=8)]
    return make_corpus(tmp_path_factory.mktemp("other"), small_model, texts)


@pytest.fixture
def options(small_model: Path, corpus_folder: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Return `options(**changes)`: a short run in `tmp_path/run`."""
    return partial(run_options, (small_model, corpus_folder, tmp_path / "run"))
