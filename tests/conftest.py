"""Environment and fixtures of all tests.

Environment variables are set before JAX is imported, and subprocesses inherit them. Tests use one simulated CPU device,
in folders named `sharding` eight, and share a cache of compiled programs.
"""

import os
from importlib.metadata import version

from compile_cache import cache_folder

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_SELFTRAIN_TEST_PLATFORM", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Compilation is most of the cost of the tests: all tests, their subprocesses and later runs share programs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
if "JAX_SELFTRAIN_TEST_OPTIMIZED" not in os.environ:  # compiles faster, runs as fast
    flags = "--xla_backend_optimization_level=1"
    if version("jaxlib").startswith("0.10."):  # newer versions refuse it
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import hypothesis
import pytest
from bad_input import ValidInput
from models_factory import write_tiny_hf_model
from run_factory import make_run_config, write_inputs

from jax_selftrain.config import RunConfig
from jax_selftrain.report import write_report
from jax_selftrain.study import run

hypothesis.settings.register_profile("no deadline", deadline=None)  # the time of an example depends on the machine
hypothesis.settings.load_profile("no deadline")
gc.set_threshold(20_000, 10, 10)  # JAX keeps millions of objects, so that each garbage collection is slow


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of a module-scoped fixture, and those of the finished run, in one worker, which makes it once."""
    for item in items:
        info = getattr(item, "_fixtureinfo", None)
        fixtures = info.name2fixturedefs if info else {}
        if "finished_run" in fixtures:
            item.add_marker(pytest.mark.xdist_group("finished_run"))
        elif any(definitions[-1].scope == "module" for definitions in fixtures.values()):
            item.add_marker(pytest.mark.xdist_group(item.path.relative_to(item.config.rootpath).as_posix()))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real data: a trained model, tokenizers and benchmarks."""
    value = os.environ.get("JAX_SELFTRAIN_DATA")
    if not value:
        pytest.skip("JAX_SELFTRAIN_DATA is not set; this test needs a trained model and texts")
    return Path(value).resolve()


@pytest.fixture(scope="session")
def stories260k(data_dir: Path) -> Path:
    """Hugging Face folder of a trained Llama with 260,032 parameters."""
    return data_dir / "stories260k"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Function `(family, **overrides)` that returns a Hugging Face folder."""
    folders: dict[str, Path] = {}

    def make(family: str = "llama", **overrides) -> Path:
        key = repr((family, sorted(overrides.items())))
        if key not in folders:
            folder = tmp_path_factory.mktemp("tiny") / family
            write_tiny_hf_model(folder, family, **overrides)
            folders[key] = folder
        return folders[key]

    return make


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Task, text and sequence files by name."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def options(tiny_model: Callable[..., Path], inputs: dict[str, str]) -> Callable[..., RunConfig]:
    """`options(out, **changes)`: the small run, all stages on one device."""
    return partial(make_run_config, tiny_model("llama"), inputs)


@pytest.fixture(scope="session")
def finished_run(options: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished small run with its report; tests must not change it."""
    folder = run(options(tmp_path_factory.mktemp("run") / "out"))
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> ValidInput:
    """Valid input for the tests of invalid input; each file is made when first used."""
    return ValidInput(tmp_path_factory.mktemp("valid"))
