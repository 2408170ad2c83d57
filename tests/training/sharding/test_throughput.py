"""Peak FLOPs of several devices."""

import pytest

from jax_selftrain.config import TrainConfig
from jax_selftrain.distributed.mesh import make_mesh
from jax_selftrain.hub import open_model
from jax_selftrain.training.flops import PEAK_FLOPS, make_throughput


def test_peaks_are_of_all_devices_of_the_mesh(tiny_model, monkeypatch: pytest.MonkeyPatch):
    mesh, config = make_mesh("data=4"), open_model(tiny_model()).config
    monkeypatch.setitem(PEAK_FLOPS, mesh.devices.flat[0].device_kind, 1e12)
    assert make_throughput(TrainConfig(dtype="bfloat16"), config, mesh).peak_flops == 4e12
    assert make_throughput(TrainConfig(dtype="float32"), config, mesh).peak_flops is None
