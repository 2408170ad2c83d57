"""One process of `test_processes.py`; writes its results as JSON."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from params_hash import hash_params

from jax_selftrain import hub
from jax_selftrain.config import ConvertConfig, MergeConfig
from jax_selftrain.distributed.mesh import make_mesh
from jax_selftrain.distributed.sharding import make_sharding_rules
from jax_selftrain.errors import InputError
from jax_selftrain.hub import safetensors_io
from jax_selftrain.hub.families import FAMILIES
from jax_selftrain.models import axis_sizes


def count_read_bytes() -> list[int]:
    """Return a list that gets the size of each part of a tensor that is read."""
    sizes, read_box = [], safetensors_io.read_box

    def count(*arguments: Any) -> np.ndarray:
        data = read_box(*arguments)
        sizes.append(data.nbytes)
        return data

    safetensors_io.read_box = count
    return sizes


def main(coordinator: str, index: int, work: Path) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes=2, process_id=index)
    seen: dict[str, int | str] = {"devices": jax.device_count()}

    base = hub.open_model(work / "hf")
    config, raw = base.config, base.raw_config
    rules = make_sharding_rules("fsdp", make_mesh("data=4,model=2"), axis_sizes(config))
    sizes = count_read_bytes()
    params = safetensors_io.load_params(work / "hf", FAMILIES[raw["model_type"]], config, rules)[0]
    seen["read"] = sum(sizes)
    seen["fingerprint"] = hash_params(params)

    hub.save_model(work / "together", params, source=base, metadata={})
    seen["restored"] = hash_params(hub.load_model(work / "together", make_mesh("data=2,model=4")).params)
    try:
        hub.save_model(work / "together", params, source=base, metadata={})
    except InputError as error:
        seen["refused"] = str(error)

    merge = MergeConfig(base=str(work / "hf"), student=str(work / "student"), weight=0.5, out=str(work / "merged"))
    hub.merge(merge)
    seen["merged"] = hub.open_model(hub.merge(merge)).fingerprint  # the second time it is there

    hub.convert(ConvertConfig(source=str(work / "hf"), out=str(work / "converted")))
    hub.convert(ConvertConfig(source=str(work / "converted"), out=str(work / "exported"), format="hf"))

    if index == 1:  # alone, on its own devices: must not wait for the other process
        seen["alone"] = hash_params(hub.load_model(work / "ours", make_mesh("model=2", jax.local_devices())).params)
    (work / f"seen-{index}.json").write_text(json.dumps(seen))
    multihost_utils.sync_global_devices("done")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
