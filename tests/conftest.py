"""Shared by all tests: one simulated CPU device, a cache of compiled programs, real data where it is available.

Environment variables are set before JAX is imported; subprocesses inherit them. Tests in `tests/sharding/` run with eight
devices.
"""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path


def _cache_folder() -> Path:
    """Return the folder of compiled programs for this JAX, processor and set of XLA flags."""
    cpu = [platform.machine()]
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu += sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    key = "\n".join([version("jaxlib"), os.environ.get("XLA_FLAGS", ""), *cpu])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "jax_selftrain" / f"tests-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_SELFTRAIN_TEST_PLATFORM", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Compilation is most of the cost of the suite: programs are shared by all tests, their subprocesses and later runs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache_folder()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import gc
from collections.abc import Callable

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
