"""The device mesh and where every array lies on it.

One mesh with two explicit axes, `data` and `model`, serves everything from one CPU to a pod (`jax.jit` over a named
mesh: `pjit` in its modern spelling). Axes are *explicit*: an array's sharding is part of its type, so nothing is
replicated behind our back (under automatic axes `jit(tx.init)` silently replicated Adam's moments).

Arrays name their dimensions by *logical* axes; one frozen rules table says on which mesh axis each lies. A preset is
such a table. Parameters, optimizer state, cache and batches all take their shardings from it.

| logical axis | dimension | replicated | tensor | fsdp |
|---|---|---|---|---|
| `batch` | B | data | data | data |
| `embed` | D of a parameter | – | – | data |
| `vocab`, `mlp` | V, F | – | model | model |
| `kv_heads` | G | – | model, if it divides G | as tensor |
| `q_per_kv` | R = H/G | – | model, where key/value heads are fewer and replicated | as tensor |
| `layers`, `head_dim` | L, K | – | – | – |
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractMesh, AxisType, Mesh, use_abstract_mesh

from jax_selftrain.errors import InputError

AXES = ("data", "model")


def parse_mesh(spec: str, devices: int) -> dict[str, int]:
    """Read `data=4,model=2`; an axis left out has size 1; an empty spec puts all `devices` on `data`."""
    if not spec.strip():
        return {"data": devices, "model": 1}
    shape = dict.fromkeys(AXES, 1)
    for part in spec.split(","):
        name, separator, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES or not separator or not size.isdigit() or int(size) < 1:
            raise InputError(f"--mesh {spec!r}: cannot read {part!r}; write for instance data=4,model=2")
        shape[name] = int(size)
    return shape


def make_mesh(spec: str = "", devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Build the mesh that `spec` describes over `devices` (default: all devices of all processes).

    Raises:
      InputError: the spec cannot be read or asks for more devices than there are.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = parse_mesh(spec, len(devices))
    wanted = shape["data"] * shape["model"]
    if wanted > len(devices):
        raise InputError(f"--mesh {spec}: needs {wanted} devices, but there are {len(devices)}; ask for a smaller mesh")
    types = (AxisType.Explicit,) * len(AXES)
    mesh = jax.make_mesh(tuple(shape[axis] for axis in AXES), AXES, devices=devices[:wanted], axis_types=types)
    places = _device_coords(mesh)
    if places is None:
        return mesh
    return Mesh(mesh.devices[np.lexsort(places[:, 0, ::-1].T)], AXES, axis_types=types)


def _device_coords(mesh: Mesh | AbstractMesh) -> np.ndarray | None:
    """[data, model, dimensions]: where each device stands in the torus of its TPU slice; None where there is none."""
    if isinstance(mesh, AbstractMesh) or mesh_platform(mesh) != "tpu":
        return None
    devices: list[Any] = list(mesh.devices.flat)
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        return None
    return np.array([(*device.coords, device.core_on_chip) for device in devices]).reshape(*mesh.devices.shape, -1)


AxisGroups = list[list[int]]
"""Groups of places along `data`."""


def torus_axis_groups(mesh: Mesh | AbstractMesh) -> list[AxisGroups]:
    """Where replicas fill a box of a TPU's torus: for each of its dimensions, the lines of replicas along it.

    Places along `data` count the box row by row (`make_mesh` sees to that), so that scattering along one dimension
    after the other leaves each replica what scattering at once would. Empty where there is nothing to divide.
    """
    places = _device_coords(mesh)
    return [] if places is None else _lines(places)


def _lines(places: np.ndarray) -> list[AxisGroups]:
    """Of devices at these places [data, model, dimensions]."""
    along = [sorted(set(places[:, 0, k].tolist())) for k in range(places.shape[-1])]
    box = np.stack(np.meshgrid(*along, indexing="ij"), axis=-1).reshape(-1, len(along))
    beside = places - places[:, :1]  # the other devices of the model axis, seen from each replica's first
    sizes = [len(values) for values in along if len(values) > 1]
    if len(sizes) < 2 or not np.array_equal(box, places[:, 0]) or (beside != beside[:1]).any():
        return []
    numbers = np.arange(len(places)).reshape(sizes)
    return [np.moveaxis(numbers, k, -1).reshape(-1, size).tolist() for k, size in enumerate(sizes)]


def mesh_platform(mesh: Mesh | AbstractMesh) -> str:
    """`cpu`, `gpu` or `tpu`: where programs over a mesh run, also one that has a shape and no devices (`pods`)."""
    return mesh.abstract_device.platform if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0].platform


@contextmanager
def mesh_context(mesh: Mesh | AbstractMesh) -> Iterator[None]:
    """While inside, arrays without a sharding of their own are of this mesh; without devices, to be traced.

    Programs over several CPU devices are compiled anew by each process. With JAX 0.10.2, one read back from the
    compilation cache has lost the order between a loop's collectives and those around it; the CPU runs what has no
    order at once, so two devices may begin with different ones and wait for each other for ever.
    """
    if isinstance(mesh, AbstractMesh):
        with use_abstract_mesh(mesh):
            yield
    else:
        several_cpus = mesh.size > 1 and mesh_platform(mesh) == "cpu"
        with jax.set_mesh(mesh), no_compilation_cache() if several_cpus else nullcontext():
            yield


class _CompilationCacheToggle:
    """JAX's compilation cache, off for the whole process as long as anybody asks for it, in whatever thread."""

    def __init__(self) -> None:
        self.lock, self.askers, self.before = threading.Lock(), 0, True

    def off(self) -> None:
        """For one more."""
        with self.lock:
            if self.askers == 0:
                self.before = jax.config.values["jax_enable_compilation_cache"]
                self._set(False)
            self.askers += 1

    def back(self) -> None:
        """For one less."""
        with self.lock:
            self.askers -= 1
            if self.askers == 0:
                self._set(self.before)

    @staticmethod
    def _set(enabled: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()  # else JAX goes by what held when its first program was compiled


_CACHE = _CompilationCacheToggle()


@contextmanager
def no_compilation_cache() -> Iterator[None]:
    """While inside, no compiled program is read from JAX's compilation cache, and none is kept there."""
    _CACHE.off()
    try:
        yield
    finally:
        _CACHE.back()


def xla_options() -> dict[str, bool]:
    """For `jax.jit` of the programs that the time is spent in, on this process's default devices.

    On a CPU, XLA may run independent operations at once. They are few and small beside the products, which
    use all cores anyway: one after the other took a seventh less time (2 cores, the shape of Pythia-70m).
    """
    return {"xla_cpu_enable_concurrency_optimized_scheduler": False} if jax.default_backend() == "cpu" else {}
