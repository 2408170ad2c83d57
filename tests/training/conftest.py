"""A tiny corpus, and run options that fit it."""

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from models_factory import tiny_texts
from training_runs import run_options

from jax_selftrain.config import ImportConfig, TrainConfig
from jax_selftrain.corpus import import_text


@pytest.fixture(scope="package", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled programs are kept on disk meanwhile: most runs here, killed processes too, are of the same program."""
    basetemp = tmp_path_factory.getbasetemp()
    shared = basetemp.parent if "PYTEST_XDIST_WORKER" in os.environ else basetemp  # by the workers of one session
    settings = {
        "jax_compilation_cache_dir": str(shared / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in settings.items():
            jax.config.update(name, value)
            environment.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def small_model(tiny_model) -> Path:
    """A Llama that compiles and trains in a moment."""
    return tiny_model(
        "llama", hidden_size=32, intermediate_size=48, num_key_value_heads=4, num_hidden_layers=1, vocab_size=320
    )


@pytest.fixture(scope="session")
def corpus_folder(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty beginnings of stories, in the tokens of `small_model`."""
    folder = tmp_path_factory.mktemp("corpus")
    source = folder / "texts.jsonl"
    texts = [text[: 40 + 37 * i % 80] for i, text in enumerate(tiny_texts(60, seed=7))]  # of many lengths
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    import_text(ImportConfig(source=str(source), model=str(small_model), out=str(folder / "corpus")))
    return folder / "corpus"


@pytest.fixture
def options(small_model: Path, corpus_folder: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """`options(**changes)` → a run of a few steps on two devices into `tmp_path/run`."""
    return partial(run_options, (small_model, corpus_folder, tmp_path / "run"))
