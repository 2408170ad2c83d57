"""The small run and its input files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from run_factory import make_run_config, write_inputs

from jax_selftrain.config import RunConfig
from jax_selftrain.report import write_report
from jax_selftrain.study import run


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
    """The folder of a finished small run; tests must not change it."""
    folder = run(options(tmp_path_factory.mktemp("run") / "out"))
    write_report(folder)
    return folder
