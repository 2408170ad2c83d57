"""TODO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_selftrain.errors import InputError

Axes = tuple[str | None, ...]
"""Logical axis of every dimension of an array; None for a dimension that is never sharded."""


@dataclass(frozen=True)
class ShardingRules:
    """A mesh and the rules table that places logical axes on it. Hashable: it can be a static argument of a jit."""

    mesh: Mesh
    logical_to_mesh: tuple[tuple[str, str | None], ...]

    def spec(self, axes: Axes) -> PartitionSpec:
        """The partition of an array with these logical axes.

        Raises:
          ValueError: an axis is not in the table, or two dimensions would lie on one mesh axis (a defect of ours).
        """
        table = dict(self.logical_to_mesh)
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

    def unsharded_embed(self, axes: Axes) -> NamedSharding:
        """The sharding in which a parameter is *used*: as stored, but whole along `embed` (fsdp gathers it)."""
        return self.sharding(tuple(None if axis == "embed" else axis for axis in axes))

    def without_data_axis(self) -> ShardingRules:
        """Return the rules inside a `jax.shard_map` over `data`: the same, without that axis."""
        rules = tuple((axis, None if placed == "data" else placed) for axis, placed in self.logical_to_mesh)
        return ShardingRules(
            cast(Mesh, jax.sharding.get_abstract_mesh()), rules
        )  # it serves shardings as well as a Mesh does

    @property
    def data_parallelism(self) -> int:
        """Devices along `data`: the number of replicas that share a batch."""
        return self.mesh.shape["data"]

    @property
    def tensor_parallelism(self) -> int:
        """Devices along `model`: the degree of tensor parallelism."""
        return self.mesh.shape["model"]


def make_sharding_rules(preset: str, mesh: Mesh, sizes: Mapping[str, int]) -> ShardingRules:
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
                f"({_describe(sizes)}); model can be {_join(legal)}"
            )
        rules |= {"vocab": "model", "mlp": "model"}
        rules["kv_heads" if sizes["kv_heads"] % model == 0 else "q_per_kv"] = "model"
    if preset == "fsdp":
        data = mesh.shape["data"]
        if sizes["embed"] % data:
            legal = [n for n in range(1, sizes["embed"] + 1) if sizes["embed"] % n == 0]
            raise InputError(
                f"--preset fsdp --mesh data={data} does not divide this model's width {sizes['embed']}; "
                f"data can be {_join(legal)}"
            )
        rules["embed"] = "data"
    return ShardingRules(mesh, tuple(rules.items()))


def _model_axis_fits(model: int, sizes: Mapping[str, int]) -> bool:
    heads_fit = sizes["kv_heads"] % model == 0 or (sizes["kv_heads"] < model and sizes["q_per_kv"] % model == 0)
    return heads_fit and sizes["vocab"] % model == 0 and sizes["mlp"] % model == 0


def _describe(sizes: Mapping[str, int]) -> str:
    heads = sizes["kv_heads"] * sizes["q_per_kv"]
    return f"{heads} heads over {sizes['kv_heads']} key/value heads, {sizes['mlp']}, {sizes['vocab']}"


def shard_host_array(rules: ShardingRules, array: np.ndarray, axes: Axes) -> jax.Array:
    """Put a host array on the mesh; every process passes the same whole array and keeps its own part."""
    sharding = rules.sharding(axes)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _join(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
