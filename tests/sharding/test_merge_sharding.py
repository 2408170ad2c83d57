"""Tests of `merge` on several devices."""

from dataclasses import replace
from pathlib import Path

import pytest
from model_params import param_bytes
from models_factory import write_model_pair

from jax_selftrain import hub
from jax_selftrain.config import MergeConfig


@pytest.mark.parametrize(
    ("mesh", "preset"),
    [("data=4,model=2", "fsdp"), pytest.param("data=2,model=2", "tensor", marks=pytest.mark.nightly)],
)
def test_the_mesh_changes_no_bit(mesh: str, preset: str, tmp_path: Path):
    base, student = map(str, write_model_pair(tmp_path, "llama"))
    config = MergeConfig(base=base, student=student, weight=-0.5, out=str(tmp_path / "one"))
    merge_result = hub.merge(config)
    out = hub.merge(replace(config, out=str(tmp_path / "many"), mesh=mesh, preset=preset))
    assert param_bytes(out) == param_bytes(merge_result)
    assert hub.open_model(out).fingerprint == hub.open_model(merge_result).fingerprint
