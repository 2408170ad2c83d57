"""What a program asks of each chip, read from its trace: floating-point operations and the bytes of its arguments.

Axes of a mesh are explicit here, so that every array in a trace says how it lies on the chips: an operation's share on
one chip follows from the shapes alone, before anything is compiled.

Only matrix products count as work, 2 · m · n · k operations each: all else of a decoder is below a hundredth of
them. Loops count as often as they turn. A fused kernel counts for all its tiles, also those that it will skip.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

_DotGeneral = tuple[str, float]
"""The type that decides how fast it is, and its operations."""


def flops(program: core.ClosedJaxpr, dynamic_turns: Sequence[float] = ()) -> float:
    """Floating-point operations of matrix products on each chip.

    Args:
      program: a trace over a mesh with explicit axes (`jax.jit(…).trace(…).jaxpr`).
      dynamic_turns: turns of the `while` loops, by how many of them stand around one.

    Raises:
      ValueError: a `while` stands deeper than that, or a product is of a kind that is not known (a defect of ours).
    """
    return sum(flops_by_dtype(program, dynamic_turns).values())


def flops_by_dtype(program: core.ClosedJaxpr, dynamic_turns: Sequence[float] = ()) -> dict[str, float]:
    """The same, by the type that decides how fast a product is: `float32` where an operand is as wide and the highest
    precision is asked for, of which a TPU makes several passes (fewer where the other operand is narrow, which makes no
    difference here); else `bfloat16`.
    """
    found: dict[str, float] = {}
    # What nobody needs is not compiled: gradients of frozen weights, for one.
    needed, _ = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    for dtype, operations in _dot_generals(needed, tuple(dynamic_turns), 0):
        found[dtype] = found.get(dtype, 0.0) + operations
    return found


def _dot_generals(
    jaxpr: core.Jaxpr, trip_counts: tuple[float, ...], depth: int, times: float = 1.0
) -> Iterator[_DotGeneral]:
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            yield _type_of_product(equation), times * _of_product(equation)
        elif name in ("conv_general_dilated", "ragged_dot", "ragged_dot_general"):
            raise ValueError(f"operations of {name} are not counted yet")
        elif name == "while":
            if depth >= len(trip_counts):
                raise ValueError("nobody says how often a loop turns")
            for part in (parameters["body_jaxpr"].jaxpr, parameters["cond_jaxpr"].jaxpr):
                yield from _dot_generals(part, trip_counts, depth + 1, times * trip_counts[depth])
        elif name == "scan":
            yield from _dot_generals(parameters["jaxpr"].jaxpr, trip_counts, depth, times * parameters["length"])
        elif name == "cond":
            branches = [
                list(_dot_generals(branch.jaxpr, trip_counts, depth, times)) for branch in parameters["branches"]
            ]
            yield from max(branches, key=lambda products: sum(operations for _, operations in products))
        elif name == "pallas_call":
            tiles = math.prod(parameters["grid_mapping"].grid)
            yield from _dot_generals(parameters["jaxpr"], trip_counts, depth, times * tiles)
        else:
            for inner in _inner_jaxprs(parameters.values()):
                yield from _dot_generals(inner, trip_counts, depth, times)


def _type_of_product(equation: Any) -> str:
    wide = max(variable.aval.dtype.itemsize for variable in equation.invars) >= 4
    precisions = equation.params["precision"] or ()
    return "float32" if wide and jax.lax.Precision.HIGHEST in precisions else "bfloat16"


def _of_product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, result = _local_shape(equation.invars[0].aval), _local_shape(equation.outvars[0].aval)
    return 2.0 * math.prod(result) * math.prod(left[dimension] for dimension in contracted)


def _inner_jaxprs(values: Iterable[Any]) -> Iterator[core.Jaxpr]:
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _inner_jaxprs(value)


def _local_shape(aval: Any) -> tuple[int, ...]:
    """The part of an array that one chip holds."""
    sharding = getattr(aval, "sharding", None)
    if sharding is None:
        return tuple(aval.shape)
    sizes, local = sharding.mesh.shape, []
    for size, axes in zip(aval.shape, [*sharding.spec, *[None] * len(aval.shape)], strict=False):
        names = (axes,) if isinstance(axes, str) else axes or ()
        local.append(size // math.prod(sizes[name] for name in names))
    return tuple(local)


def per_device_bytes(arrays: Any, *, tile_padded: bool) -> int:
    """Bytes that a tree of (abstract) arrays takes on each chip.

    Args:
      tiled: as a TPU stores them, in tiles of 8 × 128 elements that are filled up.
    """
    return sum(_bytes_of(leaf, tile_padded) for leaf in jax.tree.leaves(arrays))


def _bytes_of(leaf: Any, tiled: bool) -> int:
    shape = _local_shape(leaf)
    return (_tiled(shape) if tiled else math.prod(shape)) * np.dtype(leaf.dtype).itemsize


def _tiled(shape: tuple[int, ...]) -> int:
    """Elements with padding: the compiler lays the two dimensions along a tile that waste least."""
    if len(shape) < 2:
        size = math.prod(shape)
        return _round_up(size, 1024 if size >= 1024 else 128)
    best = min(
        _round_up(across, 128) * _rows(down) * math.prod(shape) // (across * down)
        for i, across in enumerate(shape)
        for j, down in enumerate(shape)
        if i != j
    )
    return best


def _rows(size: int) -> int:
    """Of a dimension along the short side of tiles, which are lower where there is little to hold."""
    return _round_up(size, 8) if size > 4 else 1 << (size - 1).bit_length()


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
