"""One of the two processes of `test_processes.py`: loads, saves and restores, and writes what it saw as JSON."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from jax_selftrain import hub
from jax_selftrain.hub import checkpoint
from jax_selftrain.hub.digest import weights_fingerprint
from jax_selftrain.hub.families import FAMILIES
from jax_selftrain.hub.safetensors_io import SafetensorsReader, load_params, open_weights
from jax_selftrain.hub.trees import flatten, unflatten
from jax_selftrain.mesh import make_layout, make_mesh
from jax_selftrain.models import axis_sizes


class CountingReader:
    """Counts the bytes that go through a real reader."""

    def __init__(self, reader: SafetensorsReader):
        self._reader, self.folder, self.tensors, self.bytes = reader, reader.folder, reader.tensors, 0

    def read(self, name: str, bounds: tuple[slice, ...]) -> np.ndarray:
        data = self._reader.read(name, bounds)
        self.bytes += data.nbytes
        return data


def main(coordinator: str, index: int, work: Path) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes=2, process_id=index)
    seen = {"devices": jax.device_count()}

    config, raw = hub.read_config(work / "hf")
    layout = make_layout("fsdp", make_mesh("data=4,model=2"), axis_sizes(config))
    with open_weights(work / "hf") as reader:
        counting = CountingReader(reader)
        params, _ = load_params(counting, FAMILIES[raw["model_type"]], config, layout)
    seen["read"] = counting.bytes
    seen["fingerprint"] = weights_fingerprint(params)

    checkpoint.save_tree(work / "together", params)
    jax.experimental.multihost_utils.sync_global_devices("saved")
    turned = make_layout("tensor", make_mesh("data=8"), axis_sizes(config))
    shardings = flatten(hub.load.param_shardings(config, turned))
    abstract = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=shardings[k]) for k, v in flatten(params).items()}
    seen["restored"] = weights_fingerprint(checkpoint.load_tree(work / "together", unflatten(abstract)))

    if index == 1:  # alone, on its own devices: must not wait for the other process
        own = hub.load_model(work / "ours", make_mesh("model=2", jax.local_devices()))
        seen["alone"] = weights_fingerprint(own.params)
        checkpoint.save_tree(work / "alone", own.params)
    (work / f"seen-{index}.json").write_text(json.dumps(seen))
    jax.experimental.multihost_utils.sync_global_devices("done")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
