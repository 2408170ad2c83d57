"""The device mesh and where every array lies on it.

One mesh with two explicit axes, `data` and `model`, serves everything from one CPU to a pod (`jax.jit` over a named
mesh: `pjit` in its modern spelling). Axes are *explicit*: an array's sharding is part of its type, so nothing is
replicated behind our back (under automatic axes `jit(tx.init)` silently replicated Adam's moments).

Arrays name their dimensions by *logical* axes; one frozen rules table says on which mesh axis each lies. A preset is
such a table. Parameters, optimiser state, cache and batches all take their shardings from it.

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from jax_selftrain.errors import InputError

AXES = ("data", "model")

Axes = tuple[str | None, ...]
"""Logical axis of every dimension of an array; None for a dimension that is never sharded."""


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
    places = _places(mesh)
    if places is None:
        return mesh
    return Mesh(mesh.devices[np.lexsort(places[:, 0, ::-1].T)], AXES, axis_types=types)


def _places(mesh: Mesh | AbstractMesh) -> np.ndarray | None:
    """[data, model, dimensions]: where each device stands in the torus of its TPU slice; None where there is none."""
    if isinstance(mesh, AbstractMesh) or platform_of(mesh) != "tpu":
        return None
    devices: list[Any] = list(mesh.devices.flat)
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        return None
    return np.array([(*device.coords, device.core_on_chip) for device in devices]).reshape(*mesh.devices.shape, -1)


Lines = list[list[int]]
"""Groups of places along `data`."""


def data_lines(mesh: Mesh | AbstractMesh) -> list[Lines]:
    """Where replicas fill a box of a TPU's torus: for each of its dimensions, the lines of replicas along it.

    Places along `data` count the box row by row (`make_mesh` sees to that), so that scattering along one dimension
    after the other leaves each replica what scattering at once would. Empty where there is nothing to divide.
    """
    places = _places(mesh)
    return [] if places is None else _lines(places)


def _lines(places: np.ndarray) -> list[Lines]:
    """Of devices at these places [data, model, dimensions]."""
    along = [sorted(set(places[:, 0, k].tolist())) for k in range(places.shape[-1])]
    box = np.stack(np.meshgrid(*along, indexing="ij"), axis=-1).reshape(-1, len(along))
    beside = places - places[:, :1]  # the other devices of the model axis, seen from each replica's first
    sizes = [len(values) for values in along if len(values) > 1]
    if len(sizes) < 2 or not np.array_equal(box, places[:, 0]) or (beside != beside[:1]).any():
        return []
    numbers = np.arange(len(places)).reshape(sizes)
    return [np.moveaxis(numbers, k, -1).reshape(-1, size).tolist() for k, size in enumerate(sizes)]


@dataclass(frozen=True)
class Layout:
    """A mesh and the rules table that places logical axes on it. Hashable: it can be a static argument of a jit."""

    mesh: Mesh
    rules: tuple[tuple[str, str | None], ...]

    def spec(self, axes: Axes) -> PartitionSpec:
        """The partition of an array with these logical axes.

        Raises:
          ValueError: an axis is not in the table, or two dimensions would lie on one mesh axis (a defect of ours).
        """
        table = dict(self.rules)
        unknown = [axis for axis in axes if axis is not None and axis not in table]
        if unknown:
            raise ValueError(f"no rule for logical axis {unknown[0]!r}; known: {', '.join(table)}")
        placed = [None if axis is None else table[axis] for axis in axes]
        used = [axis for axis in placed if axis is not None]
        if len(set(used)) != len(used):
            raise ValueError(f"logical axes {axes} collide: they would lie on mesh axes {placed}")
        return PartitionSpec(*placed)

    def sharding(self, axes: Axes) -> NamedSharding:
        """`spec`, bound to the mesh."""
        return NamedSharding(self.mesh, self.spec(axes))

    def gathered(self, axes: Axes) -> NamedSharding:
        """The sharding in which a parameter is *used*: as stored, but whole along `embed` (fsdp gathers it)."""
        return self.sharding(tuple(None if axis == "embed" else axis for axis in axes))

    def on_one_replica(self) -> Layout:
        """The layout inside a `jax.shard_map` over `data`: the same, without that axis."""
        rules = tuple((axis, None if placed == "data" else placed) for axis, placed in self.rules)
        return Layout(cast(Mesh, jax.sharding.get_abstract_mesh()), rules)  # it serves shardings as well as a Mesh does

    @property
    def data(self) -> int:
        """Devices along `data`: the number of replicas that share a batch."""
        return self.mesh.shape["data"]

    @property
    def model(self) -> int:
        """Devices along `model`: the degree of tensor parallelism."""
        return self.mesh.shape["model"]


def make_layout(preset: str, mesh: Mesh, sizes: Mapping[str, int]) -> Layout:
    """Choose the rules of a preset for a model whose logical axes have the given sizes.

    Args:
      preset: `replicated`, `tensor` or `fsdp` (see the module's table).
      mesh: from `make_mesh`.
      sizes: the model's `embed`, `vocab`, `mlp`, `kv_heads`, `q_per_kv` (`models.axis_sizes`).

    Raises:
      InputError: the preset is unknown, or the mesh does not divide the model; lists the sizes that would.
    """
    rules: dict[str, str | None] = {"batch": "data"}
    rules |= dict.fromkeys(("layers", "embed", "vocab", "kv_heads", "q_per_kv", "head_dim", "mlp"))
    if preset not in ("replicated", "tensor", "fsdp"):
        raise InputError(f"--preset {preset!r} is unknown; choose replicated, tensor or fsdp")
    if preset != "replicated":
        model = mesh.shape["model"]
        if not _model_axis_fits(model, sizes):
            legal = [n for n in range(1, max(sizes.values()) + 1) if _model_axis_fits(n, sizes)]
            raise InputError(
                f"--mesh model={model} does not divide this model's heads, MLP width and vocabulary "
                f"({_describe(sizes)}); model can be {_listed(legal)}"
            )
        rules |= {"vocab": "model", "mlp": "model"}
        rules["kv_heads" if sizes["kv_heads"] % model == 0 else "q_per_kv"] = "model"
    if preset == "fsdp":
        data = mesh.shape["data"]
        if sizes["embed"] % data:
            legal = [n for n in range(1, sizes["embed"] + 1) if sizes["embed"] % n == 0]
            raise InputError(
                f"--preset fsdp --mesh data={data} does not divide this model's width {sizes['embed']}; "
                f"data can be {_listed(legal)}"
            )
        rules["embed"] = "data"
    return Layout(mesh, tuple(rules.items()))


def _model_axis_fits(model: int, sizes: Mapping[str, int]) -> bool:
    heads_fit = sizes["kv_heads"] % model == 0 or (sizes["kv_heads"] < model and sizes["q_per_kv"] % model == 0)
    return heads_fit and sizes["vocab"] % model == 0 and sizes["mlp"] % model == 0


def _describe(sizes: Mapping[str, int]) -> str:
    heads = sizes["kv_heads"] * sizes["q_per_kv"]
    return f"{heads} heads over {sizes['kv_heads']} key/value heads, {sizes['mlp']}, {sizes['vocab']}"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def platform_of(mesh: Mesh | AbstractMesh) -> str:
    """`cpu`, `gpu` or `tpu`: where programs over a mesh run, also one that has a shape and no devices (`pods`)."""
    return mesh.abstract_device.platform if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0].platform


@contextmanager
def using(mesh: Mesh | AbstractMesh) -> Iterator[None]:
    """While inside, arrays without a sharding of their own are of this mesh; without devices, to be traced.

    Programs over several CPU devices are compiled anew by each process. With JAX 0.10.2, one read back from the
    compilation cache has lost the order between a loop's collectives and those around it; the CPU runs what has no
    order at once, so two devices may begin with different ones and wait for each other for ever.
    """
    if isinstance(mesh, AbstractMesh):
        with use_abstract_mesh(mesh):
            yield
    else:
        several_cpus = mesh.size > 1 and platform_of(mesh) == "cpu"
        with jax.set_mesh(mesh), compiling_anew() if several_cpus else nullcontext():
            yield


class _CacheSwitch:
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


_CACHE = _CacheSwitch()


@contextmanager
def compiling_anew() -> Iterator[None]:
    """While inside, no compiled program is read from JAX's compilation cache, and none is kept there."""
    _CACHE.off()
    try:
        yield
    finally:
        _CACHE.back()


def place(layout: Layout, array: np.ndarray, axes: Axes) -> jax.Array:
    """Put a host array on the mesh; every process passes the same whole array and keeps its own part."""
    sharding = layout.sharding(axes)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def compiler_options() -> dict[str, bool]:
    """For `jax.jit` of the programs that the time is spent in, on this process's default devices.

    On a CPU, XLA may run independent operations at once. They are few and small beside the products, which
    use all cores anyway: one after the other took a seventh less time (2 cores, the shape of Pythia-70m).
    """
    return {"xla_cpu_enable_concurrency_optimized_scheduler": False} if jax.default_backend() == "cpu" else {}
