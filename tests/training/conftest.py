"""Fixtures: a tiny corpus and run options for it."""

import json
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
from corpus_factory import pack_corpus
from models_factory import tiny_texts
from training_runs import EVALUATED, first_scale, measuring, run_options

from jax_selftrain.config import ImportCorpusConfig, TrainConfig
from jax_selftrain.corpus import Mixture, PackedRows, import_text, open_corpus
from jax_selftrain.training import train


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


@pytest.fixture(scope="module")
def reference_run(small_model: Path, corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that `options()` describes, never interrupted."""
    folder = tmp_path_factory.mktemp("reference_run") / "run"
    return train(run_options((small_model, corpus_folder, folder)))


@pytest.fixture(scope="module")
def evaluated_run(small_model: Path, corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that `options(**EVALUATED)` describes, never interrupted."""
    config = run_options((small_model, corpus_folder, tmp_path_factory.mktemp("evaluated_run") / "run"), **EVALUATED)
    return train(config, hooks=[measuring(first_scale)])


@pytest.fixture(scope="module")
def long_run(small_model: Path, corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hundred steps, never interrupted."""
    folder = tmp_path_factory.mktemp("long_run") / "run"
    return train(run_options((small_model, corpus_folder, folder), steps=300, checkpoint_every=300))


@pytest.fixture(scope="session")
def rows(corpus_folder: Path) -> PackedRows:
    return pack_corpus(open_corpus(corpus_folder), 48, "masked")


@pytest.fixture(scope="session")
def mixture(corpus_folder: Path, other_corpus: Path) -> Mixture:
    """A quarter of the other corpus."""
    parts = [pack_corpus(open_corpus(folder), 48, "masked") for folder in (corpus_folder, other_corpus)]
    return Mixture(tuple(parts), (Fraction(3, 4), Fraction(1, 4)))
