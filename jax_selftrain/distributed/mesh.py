"""The device mesh, with the explicit axes `data` and `model`.

The sharding of an array over explicit axes is part of its type, so that no array is replicated silently. (Over
automatic axes `jit(tx.init)` replicated Adam's moments.)
"""

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
    """Parse `data=4,model=2`; a missing axis has size 1.

    An empty spec has all `devices` along `data`; another form is an InputError.
    """
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
    """Make a mesh over `devices` (default: those of all processes).

    Raises:
      InputError: the spec has another form, or needs more devices than there are.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = parse_mesh(spec, len(devices))
    wanted = shape["data"] * shape["model"]
    if wanted > len(devices):
        raise InputError(f"--mesh {spec}: needs {wanted} devices, but there are {len(devices)}; choose a smaller mesh")
    types = (AxisType.Explicit,) * len(AXES)
    mesh = jax.make_mesh(tuple(shape[axis] for axis in AXES), AXES, devices=devices[:wanted], axis_types=types)
    coords = _device_coords(mesh)
    if coords is None:
        return mesh
    return Mesh(mesh.devices[np.lexsort(coords[:, 0, ::-1].T)], AXES, axis_types=types)


def _device_coords(mesh: Mesh | AbstractMesh) -> np.ndarray | None:
    """Return the torus coordinates of TPU devices, [data, model, dims], or None."""
    if isinstance(mesh, AbstractMesh) or mesh_platform(mesh) != "tpu":
        return None
    devices: list[Any] = list(mesh.devices.flat)
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        return None
    return np.array([(*device.coords, device.core_on_chip) for device in devices]).reshape(*mesh.devices.shape, -1)


AxisGroups = list[list[int]]
"""Groups of indices along `data`."""


def torus_axis_groups(mesh: Mesh | AbstractMesh) -> list[AxisGroups]:
    """Group the replicas of a TPU torus into lines along each dimension.

    `make_mesh` orders `data` row by row in a box of the torus, so that reduce-scatters along one dimension after the
    other give the result of a single one. Empty if the replicas do not fill a box of at least two dimensions.
    """
    coords = _device_coords(mesh)
    return [] if coords is None else _group_lines(coords)


def _group_lines(coords: np.ndarray) -> list[AxisGroups]:
    """Group replicas by the coordinates of their devices, [data, model, dims]."""
    values = [sorted(set(coords[:, 0, k].tolist())) for k in range(coords.shape[-1])]
    box = np.stack(np.meshgrid(*values, indexing="ij"), axis=-1).reshape(-1, len(values))
    offsets = coords - coords[:, :1]  # along `model`, from each replica's first device
    sizes = [len(one) for one in values if len(one) > 1]
    if len(sizes) < 2 or not np.array_equal(box, coords[:, 0]) or (offsets != offsets[:1]).any():
        return []
    indices = np.arange(len(coords)).reshape(sizes)
    return [np.moveaxis(indices, k, -1).reshape(-1, size).tolist() for k, size in enumerate(sizes)]


def mesh_platform(mesh: Mesh | AbstractMesh) -> str:
    """Return `cpu`, `gpu` or `tpu`, also for an abstract mesh."""
    return mesh.abstract_device.platform if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0].platform


@contextmanager
def mesh_context(mesh: Mesh | AbstractMesh) -> Iterator[None]:
    """Set the mesh while inside; an abstract mesh is for tracing only.

    Programs over several CPU devices do not use the compilation cache. With JAX 0.10.2, a program from the cache has
    lost the order between the collectives of a loop and those around it; two CPU devices may then start different ones
    and wait for each other forever.
    """
    if isinstance(mesh, AbstractMesh):
        with use_abstract_mesh(mesh):
            yield
    else:
        has_several_cpus = mesh.size > 1 and mesh_platform(mesh) == "cpu"
        with jax.set_mesh(mesh), no_compilation_cache() if has_several_cpus else nullcontext():
            yield


_CACHE_LOCK = threading.Lock()
_num_cache_blockers, _was_cache_enabled = 0, True


@contextmanager
def no_compilation_cache() -> Iterator[None]:
    """Neither read nor write JAX's compilation cache while inside, in any thread."""
    global _num_cache_blockers, _was_cache_enabled

    def enable(value: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", value)
        compilation_cache.reset_cache()  # JAX reads the option at its first compilation

    with _CACHE_LOCK:
        if not _num_cache_blockers:
            _was_cache_enabled = jax.config.values["jax_enable_compilation_cache"]
            enable(False)
        _num_cache_blockers += 1
    try:
        yield
    finally:
        with _CACHE_LOCK:
            _num_cache_blockers -= 1
            if not _num_cache_blockers:
                enable(_was_cache_enabled)


def xla_options() -> dict[str, bool]:
    """Return compiler options for the main programs on the default devices.

    On a CPU, XLA's concurrent scheduler runs independent operations at once; the products use all cores anyway, and a
    sequential schedule takes a seventh less time (2 cores, the shape of Pythia-70m).
    """
    return {"xla_cpu_enable_concurrency_optimized_scheduler": False} if jax.default_backend() == "cpu" else {}
