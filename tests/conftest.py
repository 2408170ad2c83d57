"""Shared by all tests: one simulated CPU device, a cache of compiled programs, real data where it is available.

Environment variables are set before JAX is imported, and subprocesses inherit them. The tests in folders named
`sharding` run with eight devices.
"""

import os

from compile_cache import cache_folder

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_SELFTRAIN_TEST_PLATFORM", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Compilation is most of the cost of the suite: programs are shared by all tests, their subprocesses and later runs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import gc
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
from models_factory import write_tiny_hf_model

hypothesis.settings.register_profile("any machine", deadline=None)  # how long an example takes says nothing of ours
hypothesis.settings.load_profile("any machine")
gc.set_threshold(20_000, 10, 10)  # JAX keeps millions of objects, which are searched for garbage again and again


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a module that has module-scoped fixtures in one worker, so that they are made once."""
    for item in items:
        definitions = getattr(item, "_fixtureinfo", None)
        if definitions and any(d[-1].scope == "module" for d in definitions.name2fixturedefs.values()):
            item.add_marker(pytest.mark.xdist_group(item.path.relative_to(item.config.rootpath).as_posix()))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data (a trained model, tokenizers, benchmarks) named by JAX_SELFTRAIN_DATA."""
    value = os.environ.get("JAX_SELFTRAIN_DATA")
    if not value:
        pytest.skip("JAX_SELFTRAIN_DATA is not set: this test needs the real model and texts")
    return Path(value).resolve()


@pytest.fixture(scope="session")
def stories260k(data_dir: Path) -> Path:
    """The really trained 260,032-parameter Llama in Hugging Face layout."""
    return data_dir / "stories260k"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model(family="llama", **overrides)` → a Hugging Face folder with random weights and a real tokenizer."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", **overrides) -> Path:
        key = repr((family, sorted(overrides.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("tiny") / family
            write_tiny_hf_model(folder, family, **overrides)
            made[key] = folder
        return made[key]

    return make
