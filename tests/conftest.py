"""What every test shares: a CPU with eight simulated devices, and the real data where it is to be had.

Environment variables must be set before JAX is imported, and subprocesses inherit them.
"""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_SELFTRAIN_TEST_PLATFORM", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Compiled programs are shared by all tests, their subprocesses and later runs, as far as they may be (`mesh.using`):
# compiling is most of the suite's cost.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(os.path.dirname(__file__), "..", ".pytest_cache", "jax")
)
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
