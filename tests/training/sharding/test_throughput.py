"""Peak FLOPs of several devices."""

import pytest

from jax_selftrain.config import TrainConfig
from jax_selftrain.distributed.mesh import make_mesh
from jax_selftrain.hub import open_model
from jax_selftrain.training.flops import PEAK_FLOPS, flops_per_token, measure_speed


def test_peaks_are_of_all_devices_of_the_mesh(tiny_model, monkeypatch: pytest.MonkeyPatch):
    mesh, config = make_mesh("data=4"), open_model(tiny_model()).config
    monkeypatch.setitem(PEAK_FLOPS, mesh.devices.flat[0].device_kind, 1000.0 * flops_per_token(config, 32))
    assert measure_speed(TrainConfig(dtype="bfloat16", seq_len=32), config, mesh, 1000.0)["mfu"] == 0.25
    assert "mfu" not in measure_speed(TrainConfig(dtype="float32", seq_len=32), config, mesh, 1000.0)
