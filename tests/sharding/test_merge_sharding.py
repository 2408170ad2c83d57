"""Tests of `merge` on several devices."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from models_factory import Family, write_tiny_hf_model

from jax_selftrain import hub
from jax_selftrain.config import MergeConfig


def load_host_params(model: Path) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(hub.load_model(model, "data=1").params)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def param_bytes(model: Path) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_host_params(model).items()}


def pair(folder: Path, family: Family, **changes: Any) -> tuple[Path, Path]:
    """A base and a student that differ in every weight."""
    base = write_tiny_hf_model(folder / "base", family, seed=1, **changes)
    return base, write_tiny_hf_model(folder / "student", family, seed=2, **changes)


def options(at: tuple[Path, Path], out: Path, weight: float, **changes: Any) -> MergeConfig:
    return MergeConfig(base=str(at[0]), student=str(at[1]), weight=weight, out=str(out), **changes)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return pair(tmp_path_factory.mktemp("models"), "llama")


@pytest.fixture(scope="module")
def merge_result(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merge with w = −0.5, away from the student."""
    return hub.merge(options(models, tmp_path_factory.mktemp("merge_result") / "out", -0.5))


@pytest.mark.parametrize(("mesh", "preset"), [("data=4,model=2", "fsdp"), ("data=2,model=2", "tensor")])
def test_the_mesh_changes_no_bit(mesh: str, preset: str, models: tuple[Path, Path], merge_result: Path, tmp_path: Path):
    out = hub.merge(options(models, tmp_path / "out", -0.5, mesh=mesh, preset=preset))
    assert param_bytes(out) == param_bytes(merge_result)
    assert hub.open_model(out).fingerprint == hub.open_model(merge_result).fingerprint
