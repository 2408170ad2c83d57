"""Floating-point operations and argument bytes on each chip, from the jaxpr.

The mesh has explicit axes, so each array in a jaxpr has a sharding, and the shapes on one chip are known before
compilation. Only matrix products count, with 2 · m · n · k operations; other operations of a decoder are below one
percent. Loops count with their trip counts. A fused kernel counts all tiles, with those that it skips.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval


def flops_by_dtype(program: core.ClosedJaxpr, loop_trip_counts: Sequence[float] = ()) -> dict[str, float]:
    """Count operations by the dtype that decides a product's speed.

    `float32`: an operand is float32 and the precision is `HIGHEST`, several passes on a TPU. Else `bfloat16`.

    Args:
      program: `jax.jit(…).trace(…).jaxpr`, over a mesh with explicit axes.
      loop_trip_counts: trip counts of `while` loops by nesting depth.

    Raises ValueError if a `while` loop is nested deeper, or a primitive is not supported.
    """
    # Dead code, such as gradients of frozen weights, is not compiled.
    needed, _ = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    found: dict[str, float] = {}
    for dtype, operations in _list_products(needed, tuple(loop_trip_counts)):
        found[dtype] = found.get(dtype, 0.0) + operations
    return found


def _list_products(
    jaxpr: core.Jaxpr, trip_counts: tuple[float, ...], times: float = 1.0
) -> Iterator[tuple[str, float]]:
    """Yield (dtype, operations); `trip_counts` are those of `while` loops inside."""
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            dtype, operations = _count_product(equation)
            yield dtype, times * operations
        elif name in ("conv_general_dilated", "ragged_dot", "ragged_dot_general"):
            raise ValueError(f"operations of {name} are not counted yet")
        elif name == "while":
            if not trip_counts:
                raise ValueError("the trip count of a loop is unknown")
            for part in (parameters["body_jaxpr"].jaxpr, parameters["cond_jaxpr"].jaxpr):
                yield from _list_products(part, trip_counts[1:], times * trip_counts[0])
        elif name == "scan":
            yield from _list_products(parameters["jaxpr"].jaxpr, trip_counts, times * parameters["length"])
        elif name == "cond":
            branches = [list(_list_products(branch.jaxpr, trip_counts, times)) for branch in parameters["branches"]]
            yield from max(branches, key=lambda products: sum(operations for _, operations in products))
        elif name == "pallas_call":
            tiles = math.prod(parameters["grid_mapping"].grid)
            yield from _list_products(parameters["jaxpr"], trip_counts, times * tiles)
        else:
            for inner in _inner_jaxprs(parameters.values()):
                yield from _list_products(inner, trip_counts, times)


def _count_product(equation: Any) -> tuple[str, float]:
    wide = max(variable.aval.dtype.itemsize for variable in equation.invars) >= 4
    is_float32 = wide and jax.lax.Precision.HIGHEST in (equation.params["precision"] or ())
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, result = _local_shape(equation.invars[0].aval), _local_shape(equation.outvars[0].aval)
    operations = 2.0 * math.prod(result) * math.prod(left[dimension] for dimension in contracted)
    return "float32" if is_float32 else "bfloat16", operations


def _inner_jaxprs(values: Iterable[Any]) -> Iterator[core.Jaxpr]:
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _inner_jaxprs(value)


def _local_shape(aval: Any) -> tuple[int, ...]:
    """Return the shape of one shard of an array."""
    sharding = getattr(aval, "sharding", None)
    if sharding is None:
        return tuple(aval.shape)
    sizes, local = sharding.mesh.shape, []
    for size, axes in zip(aval.shape, [*sharding.spec, *[None] * len(aval.shape)], strict=False):
        names = (axes,) if isinstance(axes, str) else axes or ()
        local.append(size // math.prod(sizes[name] for name in names))
    return tuple(local)


def per_device_bytes(arrays: Any, *, tile_padded: bool = False) -> int:
    """Return the bytes of a tree of (abstract) arrays on each chip.

    Args:
      tile_padded: with the padding of a TPU to tiles of 8 × 128 elements.
    """
    size = _padded_size if tile_padded else math.prod
    return sum(size(_local_shape(leaf)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(arrays))


def _padded_size(shape: tuple[int, ...]) -> int:
    """Return the number of elements with padding.

    The compiler tiles the two dimensions with the least padding.
    """
    if len(shape) < 2:
        size = math.prod(shape)
        return _round_up(size, 1024 if size >= 1024 else 128)
    return min(
        _round_up(across, 128)
        * (_round_up(down, 8) if down > 4 else 1 << (down - 1).bit_length())
        * (math.prod(shape) // (across * down))
        for i, across in enumerate(shape)
        for j, down in enumerate(shape)
        if i != j
    )


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
