"""Chips and topologies of TPUs and GPUs.

A TPU topology (`v5e:4x4`) is a description of libtpu; programs are compiled for its devices on any machine. GPUs are
named by kind and number (`h100:8`, or `h100:4x8` for four hosts with eight each) and are planned by formula.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies

from jax_selftrain.config import yaml_io
from jax_selftrain.errors import InputError
from jax_selftrain.training.flops import PEAK_FLOPS

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device of a mesh."""

    device_kind: str
    """`device_kind` of JAX."""
    platform: str
    """`tpu` or `gpu`."""
    hbm_bytes: int
    """Memory in bytes."""
    bandwidth: float
    """Memory bandwidth in bytes per second."""
    ici_bandwidth: float
    """Bytes per second that it receives from other chips, over all links."""
    float32: float
    """FLOP/s of float32 products at full precision, as a fraction of those in bfloat16."""

    def flops(self, dtype: str) -> float:
        """Return the dense FLOP/s of matrix products with operands of this type."""
        return PEAK_FLOPS[self.device_kind] * (1.0 if dtype == "bfloat16" else self.float32)


# Source of TPUs: cloud.google.com/tpu/docs. `ici_bandwidth` is half of the documented "bidirectional ICI bandwidth".
FP32_MATMUL_PASSES = 1 / 6
"""A TPU computes a float32 product at `highest` precision by six bfloat16 products."""
TPUS = {
    "v4": Chip("TPU v4", "tpu", 32 * GIB, 1228e9, 300e9, FP32_MATMUL_PASSES),
    "v5e": Chip("TPU v5 lite", "tpu", 16 * GIB, 819e9, 200e9, FP32_MATMUL_PASSES),
    "v5p": Chip("TPU v5", "tpu", 95 * GIB, 2765e9, 600e9, FP32_MATMUL_PASSES),
    "v6e": Chip("TPU v6 lite", "tpu", 32 * GIB, 1640e9, 400e9, FP32_MATMUL_PASSES),
}
# Source of GPUs: NVIDIA data sheets of A100, H100 (SXM), H200 and HGX B200; half of the NVLink bandwidth.
GPUS = {
    "a100": Chip("NVIDIA A100-SXM4-80GB", "gpu", 80 * 10**9, 2039e9, 300e9, 19.5 / 312),
    "h100": Chip("NVIDIA H100 80GB HBM3", "gpu", 80 * 10**9, 3350e9, 450e9, 67 / 989.4),
    "h200": Chip("NVIDIA H200", "gpu", 141 * 10**9, 4800e9, 450e9, 67 / 989.4),
    "b200": Chip("NVIDIA B200", "gpu", 180 * 10**9, 8000e9, 900e9, 75 / 2250),
}
CARDS_PER_HOST = 8
HOST_SHAPES = {"v4": {4: "2x2x1"}, "v5p": {4: "2x2x1"}} | {
    generation: {1: "1x1", 4: "2x2", 8: "2x4"} for generation in ("v5e", "v6e")
}
"""Shapes of slices with one host, by the number of chips."""
EXAMPLES = "v5e:4x4, v4:2x2x4, v5p:2x2x2, v6e:4x4 (TPU slices), h100:8 or h100:4x8 (GPUs)"


@dataclass(frozen=True)
class Topology:
    """TPU slice, or GPUs of one or more hosts."""

    name: str
    chip: Chip
    chips: int
    chips_per_host: int

    @property
    def hosts(self) -> int:
        """Number of hosts, one process each."""
        return self.chips // self.chips_per_host

    def one_host(self) -> "Topology":
        """Return the topology of one host."""
        generation, chips = self.name.partition(":")[0], self.chips_per_host
        return parse_topology(f"{generation}:{HOST_SHAPES.get(generation, {}).get(chips, chips)}")


def parse_topology(name: str) -> Topology:
    """Parse the name of a topology, without libtpu.

    Raises InputError if the name is unknown.
    """
    generation, separator, shape = name.partition(":")
    known = {**TPUS, **GPUS}
    slice_type = re.fullmatch(r"(v\d\w*)-\d+", name)
    if slice_type:  # of Google Cloud
        generation = {"v5litepod": "v5e"}.get(slice_type[1], slice_type[1])
        examples = [one for one in EXAMPLES.split(", ") if one.startswith(f"{generation}:")] or [EXAMPLES]
        raise InputError(
            f"--topology {name}: is an accelerator type of Google Cloud; give generation and shape of the slice, for "
            f"instance {examples[0].split()[0]}"
        )
    if generation not in known:
        hint = yaml_io.did_you_mean(generation, known) or f"; for instance {EXAMPLES}"
        raise InputError(f"--topology {name}: unknown machine `{generation}`{hint}")
    sizes = [int(size) for size in shape.split("x")] if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) else []
    dimensions = (HOST_SHAPES[generation][4].count("x") + 1,) if generation in TPUS else (1, 2)
    if not separator or len(sizes) not in dimensions:
        raise InputError(
            f"--topology {name}: {f'`{shape}` is not a' if shape else 'needs a'} shape of {generation}; for instance "
            f"{EXAMPLES}"
        )
    chips = math.prod(sizes)
    if generation in TPUS:  # hosts of larger slices have four chips each
        per_host = chips if chips in HOST_SHAPES[generation] else 4
    else:
        per_host = sizes[-1] if len(sizes) == 2 else min(chips, CARDS_PER_HOST)
    if chips % per_host:
        raise InputError(f"--topology {name}: {chips} chips are not a multiple of {per_host}, the chips of one host")
    return Topology(name, known[generation], chips, per_host)


def topology_devices(topology: Topology) -> Sequence[Any]:
    """Return the devices of a TPU slice, as described by libtpu.

    Raises InputError if libtpu is not installed, or does not know the slice.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # the metadata server exists only on a TPU
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several plans can run at once
    generation = topology.name.partition(":")[0]
    bounds = [int(size) for size in HOST_SHAPES[generation][topology.chips_per_host].split("x")]
    options: dict[str, Any] = {"chips_per_host_bounds": (*bounds, 1)[:3]}
    if generation == "v4":
        options["chip_config_name"] = "megacore"  # one device for both cores of a chip
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    except RuntimeError as error:
        if "not installed" in str(error):
            raise InputError(
                "compiling for a TPU needs libtpu: pip install 'jax[tpu]' (no TPU is needed), or use "
                "--no-compile to plan by formula"
            ) from error
        raise InputError(
            f"--topology {topology.name}: libtpu does not know this slice ({str(error).splitlines()[0][:200]}); "
            f"for instance {EXAMPLES}"
        ) from error
    devices: list[Any] = sorted(described.devices, key=lambda device: (device.process_index, device.id))
    if len(devices) != topology.chips:
        raise InputError(f"--topology {topology.name}: libtpu describes {len(devices)} devices, not {topology.chips}")
    return devices
