"""A finished run with its report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from run_factory import make_run_config, write_inputs

from jax_selftrain.report import write_report
from jax_selftrain.study import run


@pytest.fixture(scope="session")
def run_folder(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished small run; tests must not change it."""
    folder = tmp_path_factory.mktemp("run")
    inputs = write_inputs(folder)
    write_report(run(make_run_config(tiny_model("llama"), inputs, folder / "out")))
    return folder / "out"
