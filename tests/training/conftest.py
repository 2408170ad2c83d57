"""A tiny corpus, and run options that fit it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from models_factory import tiny_texts

from jax_selftrain.config import ImportConfig, TrainConfig
from jax_selftrain.corpus import import_text


@pytest.fixture(scope="session")
def small_model(tiny_model) -> Path:
    """A Llama that compiles and trains in a moment."""
    return tiny_model("llama", hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=320)


@pytest.fixture(scope="session")
def corpus_folder(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short stories, in the tokens of `small_model`."""
    folder = tmp_path_factory.mktemp("corpus")
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts(60, seed=7)))
    import_text(ImportConfig(source=str(source), model=str(small_model), out=str(folder / "corpus"), max_tokens=40))
    return folder / "corpus"


@pytest.fixture
def options(small_model: Path, corpus_folder: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """`options(**changes)` → a run of a few steps on two devices into `tmp_path/run`."""

    def make(**changes) -> TrainConfig:
        return TrainConfig(
            **{
                "model": str(small_model),
                "corpus": str(corpus_folder),
                "out": str(tmp_path / "run"),
                "steps": 6,
                "batch_size": 8,
                "seq_len": 48,
                "learning_rate": 1e-3,
                "checkpoint_every": 2,
                "mesh": "data=2",
                **changes,
            }
        )

    return make
