"""Sharding rules: the mesh axis of each logical axis.

Arrays name their dimensions by logical axes, and a rules table maps these to mesh axes. A preset is such a table.
Parameters, optimizer state, KV cache and batches take their shardings from it.

| logical axis | dimension | replicated | tensor | fsdp |
|---|---|---|---|---|
| `batch` | B | data | data | data |
| `embed` | D of a parameter | – | – | data |
| `vocab`, `mlp` | V, F | – | model | model |
| `kv_heads` | G | – | model, if it divides G | as tensor |
| `q_per_kv` | R = H/G | – | model, if G < model and model divides R | as tensor |
| `layers`, `head_dim`, `positions` | L, K, P | – | – | – |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jax_selftrain.errors import InputError

Axes = tuple[str | None, ...]
"""Logical axes of the dimensions of an array; None: never sharded."""


@dataclass(frozen=True)
class ShardingRules:
    """A mesh with its rules table; hashable for `jax.jit`."""

    mesh: Mesh
    logical_to_mesh: tuple[tuple[str, str | None], ...]

    def spec(self, axes: Axes) -> PartitionSpec:
        """Return the partition spec of an array with these logical axes.

        Raises:
          ValueError: an axis is unknown, or two dimensions have the same mesh axis.
        """
        table = dict(self.logical_to_mesh)
        unknown = [axis for axis in axes if axis is not None and axis not in table]
        if unknown:
            raise ValueError(f"no rule for logical axis {unknown[0]!r}; known: {', '.join(table)}")
        mesh_axes = [None if axis is None else table[axis] for axis in axes]
        sharded = [axis for axis in mesh_axes if axis is not None]
        if len(set(sharded)) != len(sharded):
            raise ValueError(f"logical axes {axes} collide: their mesh axes would be {mesh_axes}")
        return PartitionSpec(*mesh_axes)

    def sharding(self, axes: Axes) -> NamedSharding:
        """Return the sharding of an array with these logical axes."""
        return NamedSharding(self.mesh, self.spec(axes))

    def abstract_array(self, shape: tuple[int, ...], dtype: DTypeLike, axes: Axes) -> jax.ShapeDtypeStruct:
        """Return a `ShapeDtypeStruct` with the sharding of these logical axes."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding(axes))

    def unsharded_embed(self, axes: Axes) -> NamedSharding:
        """Return the sharding of a parameter that is gathered along `embed`."""
        return self.sharding(tuple(None if axis == "embed" else axis for axis in axes))

    def without_data_axis(self) -> "ShardingRules":
        """Return the rules for the inside of a `jax.shard_map` over `data`."""
        rules = tuple((axis, None if mesh_axis == "data" else mesh_axis) for axis, mesh_axis in self.logical_to_mesh)
        # The abstract mesh has all that shardings need of a Mesh.
        return ShardingRules(cast(Mesh, jax.sharding.get_abstract_mesh()), rules)

    @property
    def data_parallelism(self) -> int:
        """Number of replicas: devices along `data`."""
        return self.mesh.shape["data"]

    @property
    def tensor_parallelism(self) -> int:
        """Degree of tensor parallelism: devices along `model`."""
        return self.mesh.shape["model"]


def make_sharding_rules(preset: str, mesh: Mesh, sizes: Mapping[str, int]) -> ShardingRules:
    """Make the rules of a preset for a model's sizes (`models.axis_sizes`).

    Raises:
      InputError: the preset is unknown, or the mesh does not divide the model; lists the sizes that do.
    """
    rules: dict[str, str | None] = {"batch": "data"}
    rules |= dict.fromkeys(("layers", "embed", "vocab", "positions", "kv_heads", "q_per_kv", "head_dim", "mlp"))
    if preset not in ("replicated", "tensor", "fsdp"):
        raise InputError(f"--preset {preset!r} is unknown; choose replicated, tensor or fsdp")
    if preset != "replicated":
        model = mesh.shape["model"]
        if not _model_axis_fits(model, sizes):
            legal = ", ".join(str(n) for n in range(1, max(sizes.values()) + 1) if _model_axis_fits(n, sizes))
            raise InputError(
                f"--mesh model={model} does not divide heads, MLP width and vocabulary; model can be {legal}"
            )
        rules |= {"vocab": "model", "mlp": "model"}
        rules["kv_heads" if sizes["kv_heads"] % model == 0 else "q_per_kv"] = "model"
    if preset == "fsdp":
        data, width = mesh.shape["data"], sizes["embed"]
        if width % data:
            legal = ", ".join(str(n) for n in range(1, width + 1) if width % n == 0)
            raise InputError(f"--mesh data={data} does not divide this model's width {width}; data can be {legal}")
        rules["embed"] = "data"
    return ShardingRules(mesh, tuple(rules.items()))


def _model_axis_fits(model: int, sizes: Mapping[str, int]) -> bool:
    heads_fit = sizes["kv_heads"] % model == 0 or (sizes["kv_heads"] < model and sizes["q_per_kv"] % model == 0)
    return heads_fit and sizes["vocab"] % model == 0 and sizes["mlp"] % model == 0


def shard_host_array(rules: ShardingRules, array: np.ndarray, axes: Axes) -> jax.Array:
    """Shard a host array over the mesh.

    Every process passes the same full array; its devices hold their shards.
    """
    return jax.make_array_from_callback(array.shape, rules.sharding(axes), lambda index: array[index])
