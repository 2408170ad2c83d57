"""One process of `test_processes.py`; writes its results as JSON."""

import json
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from model_params import count_read_bytes, hash_params

from jax_selftrain import hub
from jax_selftrain.config import ConvertConfig, MergeConfig
from jax_selftrain.distributed.mesh import make_mesh
from jax_selftrain.distributed.sharding import make_sharding_rules
from jax_selftrain.errors import InputError
from jax_selftrain.hub import safetensors_io
from jax_selftrain.hub.families import FAMILIES
from jax_selftrain.models import axis_sizes


def main(coordinator: str, index: int, work: Path) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes=2, process_id=index)
    seen: dict[str, int | str] = {"devices": jax.device_count()}

    base = hub.open_model(work / "hf")
    config, raw = base.config, base.raw_config
    rules = make_sharding_rules("fsdp", make_mesh("data=4,model=2"), axis_sizes(config))
    with count_read_bytes() as sizes:
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
    jax.distributed.shutdown()
